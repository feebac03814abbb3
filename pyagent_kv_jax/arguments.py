"""Checks of arguments that several floors share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.errors import InvalidArgumentError


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


def shown(value: Any) -> str:
    """``value`` for a message, traced or not."""
    return "<traced>" if isinstance(value, jax.core.Tracer) else str(value)
