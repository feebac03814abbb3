"""Checks of arguments that all of the pool's operations share."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError


def is_count(value: object) -> bool:
    """Whether ``value`` is a plain integer of 0 or more."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def checked_capacity(capacity: Any, rows: int, num_hits: int = 0) -> int:
    """``capacity`` as an int, small enough for sums over ``rows`` rows and their hits to fit int32.

    Raises:
        InvalidArgumentError: it is no static count, or larger.
    """
    if not is_count(capacity):
        raise InvalidArgumentError(f"capacity: got {capacity!r}, want a static integer of 0 or more")
    size = int(capacity)
    if rows * (size + 1) + num_hits >= 2**31:
        raise InvalidArgumentError(f"capacity: got {size} for {rows} rows, want (capacity + 1) * rows < 2**31")
    return size


def ints(name: str, values: ArrayLike, length: int | None = None) -> Any:
    """``values`` as a flat array of int32.

    Raises:
        ShapeMismatchError: it is none, or not of ``length``.
    """
    array: Any = values if isinstance(values, jax.Array) else np.asarray(values)
    if array.size == 0 and not isinstance(values, jax.Array):
        array = array.astype(np.int32)
    fits = array.ndim == 1 and (length is None or array.shape[0] == length)
    if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
        size = "n" if length is None else length
        raise ShapeMismatchError(f"{name}: got {array.dtype}{list(array.shape)}, want int32[{size}]")
    if array.dtype == np.int32:
        return array
    if isinstance(array, np.ndarray) and array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
        raise InvalidArgumentError(f"{name}: got {array.min()} .. {array.max()}, want values that fit int32")
    return array.astype(np.int32)
