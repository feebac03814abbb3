"""What an interpreted kernel that fails leaves behind, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax._src import dispatch


@contextmanager
def kept_inside() -> Iterator[None]:
    """A failure inside fails nothing outside.

    Interpreters call back in order: each call waits for the one before, of whatever kernel, and fails if that failed.
    Every kernel after a broken one would fail, and another broken on purpose would seem to be found out.
    """
    try:
        yield
        jax.effects_barrier()
    finally:
        dispatch.runtime_tokens.clear()  # what the barrier does too, unless it raises
