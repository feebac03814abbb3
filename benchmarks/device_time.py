"""Time on the device of one call, without the host's part: many calls in one program, and differences of two lengths.

A call of a few microseconds on an accelerator takes longer to dispatch than to run. So calls stand in a loop on the
device, each made to wait for the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[Any, Any], Any]


def device_us(step: Step, state: Any, *constants: Any, repeats: int = 5, budget_s: float = 0.02) -> float:
    """Microseconds of one ``state = step(state, *constants)``; what it returns must be of the kind of ``state``."""

    @jax.jit
    def loop(count: jax.Array, state: Any, constants: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, state: step(state, *constants), state)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(jnp.int32(count), state, constants))
        return time.perf_counter() - start

    seconds(1)
    count = 4
    while count < 4096 and seconds(count) < budget_s:
        count *= 4
    few, many = (min(seconds(n) for _ in range(repeats)) for n in (1, 1 + count))
    return (many - few if many > few else many) / count * 1e6


def chained(call: Callable[..., Any]) -> Step:
    """A step that makes ``call(small, *constants)`` and keeps its result, each call after the one before.

    State: (small, the result before). One number of the smallest array of ``small`` changes by that result times 0,
    which XLA may not leave out, as it could be NaN; and the result is carried, so that all of it is computed.
    """

    def step(state: Any, *constants: Any) -> Any:
        small, before = state
        nothing = jax.tree.leaves(before)[0].reshape(-1)[0].astype(jnp.float32) * 0
        leaves, structure = jax.tree.flatten(small)
        least = min(range(len(leaves)), key=lambda i: leaves[i].size)
        changed = leaves[least].reshape(-1).at[0].add(nothing.astype(leaves[least].dtype))
        leaves[least] = changed.reshape(leaves[least].shape)
        small = jax.tree.unflatten(structure, leaves)
        return small, call(small, *constants)

    return step


def call_us(call: Callable[..., Any], small: Any, *constants: Any, **timing: Any) -> float:
    """Microseconds of one ``call(small, *constants)``; of ``small`` there is a copy, ``constants`` stay in place."""
    shapes = jax.eval_shape(call, small, *constants)
    result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return device_us(chained(call), (small, result), *constants, **timing)


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second, read and written, of copying ``num_bytes`` from one place of the device's memory to another."""
    words = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    us = device_us(lambda words: words + jnp.uint32(1), words)
    return 2 * num_bytes / us * 1e6


def matmul_flops(size: int, dtype: Any) -> float:
    """Floating-point operations a second of a matrix product of random numbers."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype) / size**0.5
    us = device_us(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype), a, b)
    return 2 * size**3 / us * 1e6
