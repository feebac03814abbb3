"""Running a step over tables and pools on the host's CPU without paying for threads it does not need.

Such a step is some fifty operations of a microsecond or less. XLA hands the operations of a program's outermost level
out to threads, and splits some by the size of the arrays they update; waking a thread costs more than the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")

CONTROL_STEP_ON_CPU: dict[str, str] = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""``compiler_options`` for the outermost ``jax.jit`` of a control step: split no operation over threads."""


def in_one_piece(step: Callable[[Carry], Carry], carry: Carry, counter: jax.Array) -> Carry:
    """``step(carry)``, its operations run one after another by one thread.

    The step becomes the body of a loop that runs once, which XLA runs in order; 23 us instead of 39 for a decode step
    of 256 requests on 2 busy cores. That is lost where more than a few operations stay outside: XLA moves out what
    depends on nothing in the carry, so whatever a step reads should be in it, and be overwritten.

    Args:
        step: gives back the shapes it got.
        carry: updated in place where the caller's ``jit`` donates it.
        counter: i32[] of any value, from outside the program, so that XLA can't see that the loop runs once.
    """
    two = jnp.asarray(2, counter.dtype)
    once = 1 + lax.div(lax.rem(counter, two), two)
    return lax.fori_loop(0, once, lambda _, carry: step(carry), carry)
