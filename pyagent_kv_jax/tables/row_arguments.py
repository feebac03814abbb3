"""Checks of the arguments of a table's methods; lists are padded on the host, so that few programs are compiled."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.errors import InvalidArgumentError, InvalidBlockError, ShapeMismatchError
from pyagent_kv_jax.tables.padding import padded

NO_BLOCK = -(2**31)
"""Padding of a list of block ids; -1 would hide an id that is wrong."""


def static_count(name: str, value: Any) -> int:
    """``value`` as an ordinary integer.

    Raises:
        InvalidArgumentError: it is traced, no integer, negative, or no int32.
    """
    try:
        count = operator.index(value)
    except TypeError as error:
        raise InvalidArgumentError(f"{name}: got {value!r}, want an integer known at trace time") from error
    if not 0 <= count < 2**31:
        raise InvalidArgumentError(f"{name}: got {count}, want 0 or more")
    return count


def integers(name: str, values: ArrayLike, length: int | None = None) -> Any:
    """``values`` as i32[n]: on the host, or on a device where they already are.

    Raises:
        ShapeMismatchError: not a flat array of integers, or not of ``length``.
        InvalidArgumentError: an integer that is no int32.
    """
    array: Any = values if isinstance(values, jax.Array) else np.asarray(values)
    is_flat = array.ndim == 1 and length in (None, array.shape[0])
    if not is_flat or (array.size and not jnp.issubdtype(array.dtype, jnp.integer)):
        want = "n" if length is None else length
        raise ShapeMismatchError(f"{name}: got {array.dtype}{list(array.shape)}, want int32[{want}]")
    if isinstance(array, np.ndarray) and array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
        raise InvalidArgumentError(f"{name}: got {array.min()} .. {array.max()}, want integers that fit int32")
    return array.astype(np.int32)


def new_block_ids(block_ids: ArrayLike) -> Any:
    """``block_ids`` as i32[n], on the host padded with ``NO_BLOCK`` to a power of two.

    Raises:
        ShapeMismatchError: not a flat array of integers.
        InvalidBlockError: an id that is no int32, or the padding itself.
    """
    try:
        ids = integers("block_ids", block_ids if isinstance(block_ids, jax.core.Tracer) else np.asarray(block_ids))
    except InvalidArgumentError as error:
        raise InvalidBlockError(str(error)) from None
    if isinstance(ids, jax.core.Tracer):
        return ids
    if ids.size and ids.min() == NO_BLOCK:
        raise InvalidBlockError(f"block_ids: got {NO_BLOCK}, want ids of 0 or more")
    return padded(ids, fill=NO_BLOCK)
