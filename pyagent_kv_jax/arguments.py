"""Checks of arguments that several floors share."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError, is_concrete


def integer(name: str, value: ArrayLike) -> Any:
    """``value`` as np.int32, or as it is when traced.

    Raises:
        InvalidArgumentError: not one integer, or not an int32.
    """
    if isinstance(value, jax.core.Tracer):
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
            raise InvalidArgumentError(f"{name}: got {value.dtype}{list(value.shape)}, want one integer")
        return value
    array = np.asarray(value)
    if array.ndim or not np.issubdtype(array.dtype, np.integer) or not -(2**31) <= array < 2**31:
        raise InvalidArgumentError(f"{name}: got {value!r}, want one integer that fits int32")
    return np.int32(array)


def layer_index(layer: ArrayLike, num_layers: int, name: str = "layer") -> Any:
    """``layer`` as np.int32, or as it is when traced.

    Raises:
        InvalidArgumentError: not one integer; or not traced, and not one of 0 to ``num_layers - 1``.
    """
    index = integer(name, layer)
    if is_concrete(index) and not 0 <= index < num_layers:
        raise InvalidArgumentError(f"{name}: got {index}, want 0 to {num_layers - 1}")
    return index


def integers(name: str, values: ArrayLike, length: int | None = None) -> Any:
    """``values`` as i32[n]: on the host, or on a device where they already are. An empty list is one of integers.

    Raises:
        ShapeMismatchError: not a flat array of integers, or not of ``length``.
        InvalidArgumentError: an integer that is no int32.
    """
    array: Any = values if isinstance(values, jax.Array) else np.asarray(values)
    want = f"int32[{'n' if length is None else length}]"
    if array.ndim != 1 or length not in (None, array.shape[0]):
        raise ShapeMismatchError(f"{name}: got {array.dtype}{list(array.shape)}, want {want}")
    return as_int32(name, array, want)


def as_int32(name: str, array: Any, want: str) -> Any:
    """An array as int32, where it is.

    Raises:
        ShapeMismatchError: not of integers.
        InvalidArgumentError: an integer that is no int32.
    """
    if array.dtype == np.int32:
        return array
    if array.size and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ShapeMismatchError(f"{name}: got {array.dtype}{list(array.shape)}, want {want}")
    if array.size and is_concrete(array):
        low, high = (int(bound) for bound in (array.min(), array.max()))
        if not -(2**31) <= low <= high < 2**31:
            raise InvalidArgumentError(f"{name}: got {low} .. {high}, want integers that fit int32")
    return array.astype(np.int32)


def is_count(value: object) -> bool:
    """Whether ``value`` is a plain integer of 0 or more."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def static_count(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an ordinary integer.

    Raises:
        InvalidArgumentError: it is traced, no integer, below ``least``, or no int32.
    """
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = least - 1
    if not least <= count < 2**31:
        raise InvalidArgumentError(f"{name}: got {shown(value)}, want a static integer from {least} to 2**31 - 1")
    return count


def shown(value: Any) -> str:
    """``value`` for a message, traced or not."""
    return "<traced>" if isinstance(value, jax.core.Tracer) else str(value)
