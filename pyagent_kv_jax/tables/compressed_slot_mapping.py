"""Slot mappings as runs and full blocks: ``CompressedSlotMapping``, and the way to it from slots."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compressed_slots import CompressedSlotMapping
from pallas_kernels.compressed_slots import compress_slots as _compress_slots
from pyagent_kv_jax.arguments import static_count
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError, is_concrete
from pyagent_kv_jax.tables.padding import power_of_two

__all__ = ["CompressedSlotMapping", "compress_slots"]


def compress_slots(slots: Any, block_size: int, capacity: int | None = None) -> tuple[CompressedSlotMapping, jax.Array]:
    """Slots i32[T] as a mapping whose ``expand(T)`` gives them back: a word a full block, two words any other run.

    Args:
        slots: each -1, or from 0 to 2**31 - 2; in any order, repeats allowed.
        block_size: static.
        capacity: static; words of the mapping. None: as many as it takes, rounded up to a power of two; not when
            traced.

    Returns:
        (mapping, ok bool[]). Traced, and not ok: no token goes anywhere.

    Raises:
        ShapeMismatchError: not int32[T], or ``capacity`` is too small.
        InvalidArgumentError: another slot; sizes that are no static counts; no ``capacity`` when traced.
    """
    array = slots if isinstance(slots, jax.Array) else np.asarray(slots)
    if array.ndim != 1 or array.dtype != np.int32:
        raise ShapeMismatchError(f"slots: got {array.dtype}{list(array.shape)}, want int32[tokens]")
    block_size = static_count("block_size", block_size, 1)
    if capacity is None:
        capacity = power_of_two(_words_wanted(array, block_size))
    capacity = static_count("capacity", capacity)
    mapping, ok, wanted = _compress(array, block_size, capacity)
    if is_concrete(ok) and not ok:
        if int(wanted) > capacity:
            raise ShapeMismatchError(f"capacity: got {capacity} words, want the {int(wanted)} that these slots take")
        raise InvalidArgumentError(f"slots: got {array.min()} to {array.max()}, want -1 or 0 to 2**31 - 2")
    return mapping, ok


def _words_wanted(slots: Any, block_size: int) -> int:
    if not is_concrete(slots):
        raise InvalidArgumentError("capacity: got None for traced slots, want a static integer")
    return int(_compress(slots, block_size, 0)[2])


@partial(jax.jit, static_argnums=(1, 2))
def _compress(slots: jax.Array, block_size: int, capacity: int) -> tuple[CompressedSlotMapping, jax.Array, jax.Array]:
    return _compress_slots(jnp.asarray(slots), block_size, capacity)
