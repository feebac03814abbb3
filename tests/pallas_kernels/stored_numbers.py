"""Numbers as pages hold them, made with numpy and ml_dtypes alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def logical(name: str) -> np.dtype[Any]:
    """A numpy dtype (of ml_dtypes where numpy has none) by its JAX name."""
    return np.dtype(jnp.dtype(name))


def encode(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round half to even, saturate int8 and fp8; the usual conversion for the rest."""
    if dtype == np.int8:
        return np.nan_to_num(np.clip(np.rint(values), -128, 127)).astype(np.int8)
    if dtype.itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        return np.clip(values, -largest, largest).astype(np.float32).astype(dtype)
    return values.astype(np.float32).astype(dtype)


def poison(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """NaN everywhere; int8 has none and gets -128, far above any value in use."""
    return np.full(shape, -128 if dtype == np.int8 else np.nan, np.float32).astype(dtype)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], storage: np.dtype[Any]) -> Array:
    """Any bits at all, as ``storage``; but no NaN in bfloat16 and fp8, whose payload XLA does not keep on CPUs."""
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * storage.itemsize), dtype=np.uint8)
    array = raw.view(storage).reshape(shape)
    if storage.kind == "V" or storage.name.startswith(("bfloat", "float8")):
        with np.errstate(invalid="ignore"):  # signalling NaN
            array[np.isnan(array)] = 1
    return array


def bits(array: Any) -> Array:
    """The bits of an array, to compare NaN and negative zero too."""
    array = np.asarray(array)
    return array.view(BITS[array.dtype.itemsize])
