"""A mode in which bad numbers are reported: off unless asked for, because asking costs jit its fast dispatch.

A check is an effect in the program, and a jitted function with effects is called through Python: 30 us more on a
small call. So outside the mode no check is traced at all. The mode is part of jit's cache key: what was traced with it
off is traced again with it on, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import checkify

_MODE = jax.make_user_context(False)


@contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Within it, ids, slots and lengths out of range are errors that ``checkify`` reports.

    Only for this thread, and only for programs that ``checkify`` has functionalised; it must be *called* in the mode::

        with checking():
            error, out = checkify.checkify(jax.jit(step))(pages, ids)
        error.throw()

    Args:
        enabled: False switches the mode off within an outer ``checking()``.
    """
    with _MODE(enabled):
        yield


def check(holds: jax.Array, message: str, **values: jax.Array) -> None:
    """In checking mode, a ``checkify`` error with ``message`` (formatted with ``values``) unless ``holds`` bool[]."""
    if _MODE.value:
        checkify.debug_check(holds, message, **values)
