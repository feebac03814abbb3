"""Checks of arguments that the five operations share. All raise ``ArgumentError`` before any launch."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import describe, require


def require_array(name: str, value: Any, want: str, ndim: int | tuple[int, ...]) -> None:
    """``value`` is a JAX or numpy array with ``ndim`` dimensions."""
    dims = (ndim,) if isinstance(ndim, int) else ndim
    require(isinstance(value, (jax.Array, np.ndarray)), name, value, f"an array, {want}")
    require(value.ndim in dims, name, value, want)


def require_int32(name: str, value: Any, want: str, ndim: int | tuple[int, ...]) -> None:
    """``value`` is an int32 array with ``ndim`` dimensions."""
    require_array(name, value, want, ndim)
    require(value.dtype == jnp.int32, name, value, want)


def require_shape(name: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
    """``value`` has exactly ``shape``; ``meaning`` names its dimensions in the message."""
    require(tuple(value.shape) == shape, name, value, f"shape {list(shape)} = {meaning}")


def require_pages(name: str, pages: Any) -> None:
    """``pages`` is an array [pages, kv_heads, block_size, head_dim] with no empty dimension."""
    want = "[pages, kv_heads, block_size, head_dim]"
    require_array(name, pages, want, 4)
    require(min(pages.shape) > 0, name, pages, f"{want} with no dimension 0")


def require_scale(name: str, scale: Any, kv_heads: int) -> None:
    """``scale`` is None, a real number, or a floating array of shape [] or [kv_heads]."""
    if scale is None or is_real(scale):
        return
    want = f"a number or a floating array of shape [] or [{kv_heads}] = [kv_heads]"
    require_array(name, scale, want, (0, 1))
    require(jnp.issubdtype(scale.dtype, jnp.floating), name, scale, want)
    require(tuple(scale.shape) in ((), (kv_heads,)), name, scale, want)


def require_positive_int(name: str, value: Any, *, minimum: int = 1) -> None:
    """``value`` is a Python (or numpy) integer of at least ``minimum``; a traced value is not."""
    require(is_integer(value), name, value, f"an integer of at least {minimum}, static")
    require(int(value) >= minimum, name, value, f"at least {minimum}")


def require_int_scalar(name: str, value: Any, *, minimum: int) -> None:
    """``value`` is an integer or an integer array of shape []; a known value is at least ``minimum``."""
    want = f"an integer of at least {minimum}, or an integer array of shape []"
    if isinstance(value, (jax.Array, np.ndarray)):
        require(value.shape == () and jnp.issubdtype(value.dtype, jnp.integer), name, value, want)
    else:
        require(is_integer(value), name, value, want)
    if not isinstance(value, jax.core.Tracer):
        require(int(value) >= minimum, name, int(value), want)


def require_float_scalar(name: str, value: Any) -> None:
    """``value`` is a real number or a floating array of shape []."""
    want = "a number or a floating array of shape []"
    if not is_real(value):
        require_array(name, value, want, 0)
        require(jnp.issubdtype(value.dtype, jnp.floating), name, value, want)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a plain integer (``bool`` is not)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def is_real(value: Any) -> bool:
    """Whether ``value`` is a plain real number (``bool`` is not)."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def same_dtype(first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Both arrays have one dtype."""
    require(first.dtype == second.dtype, second_name, second, f"the dtype of {first_name}, {describe(first)}")
