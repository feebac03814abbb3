"""What the bits of a page mean: storage dtype, logical dtype, and the numbers between them.

Storage and meaning may differ. On CPUs keep fp8 as uint8 and bfloat16 as uint16, as unsigned bits: XLA there does
arithmetic types of that width by way of wider ones, so that an update of one row of a native bfloat16 or fp8 pool may
convert the whole pool and back (time and memory of the pool's size), and may change the payload of a NaN. ``kv_dtype``
then names the logical dtype.

Quantisation is one scale, per tensor or per KV head:

    stored = saturate(round(value / scale))        value = stored * scale
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ArgumentError, require

KV_DTYPES = tuple(
    jnp.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
)
_BITS = {1: jnp.dtype(jnp.uint8), 2: jnp.dtype(jnp.uint16), 4: jnp.dtype(jnp.uint32)}


def logical_dtype(name: str, storage: Any, kv_dtype: Any) -> jnp.dtype:
    """The logical dtype of pages kept as ``storage``; ``kv_dtype`` None means what they are kept as.

    Raises:
        ArgumentError: no number format of this package, or one that ``storage`` cannot hold.
    """
    storage, names = jnp.dtype(storage), [dtype.name for dtype in KV_DTYPES]
    if kv_dtype is None:
        if storage not in KV_DTYPES:
            raise ArgumentError(f"{name}: got pages of {storage}, want kv_dtype given, or pages of one of {names}")
        return storage
    try:
        logical = jnp.dtype(kv_dtype)
    except TypeError:
        logical = None
    require(logical in KV_DTYPES, "kv_dtype", kv_dtype, f"one of {names}")
    bits = _BITS[logical.itemsize]
    if storage not in (logical, bits):
        raise ArgumentError(f"{name}: got pages of {storage} for kv_dtype {logical}, want {logical} or {bits}")
    return logical


def decode(stored: jax.Array, kv_dtype: jnp.dtype) -> jax.Array:
    """Stored elements as float32 numbers, any scale not yet applied."""
    if stored.dtype != kv_dtype:
        if kv_dtype == jnp.bfloat16:  # bfloat16 is the upper half of float32, so it never needs to exist
            return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
        stored = jax.lax.bitcast_convert_type(stored, kv_dtype)
    return stored.astype(jnp.float32)


def encode(values: jax.Array, storage: Any, kv_dtype: jnp.dtype) -> jax.Array:
    """Numbers as stored elements, any scale already divided out.

    int8: rounded half to even, saturated to [-128, 127], NaN becomes 0 (int8 has none). fp8: saturated to the
    largest finite value; NaN stays NaN. Other formats: the usual conversion.
    """
    if kv_dtype == jnp.int8:
        rounded = jnp.clip(jnp.round(values.astype(jnp.float32)), -128, 127)
        encoded = jnp.where(jnp.isnan(values), 0, rounded).astype(jnp.int8)  # not every min and max keeps a NaN
    elif kv_dtype.itemsize == 1:
        largest = float(jnp.finfo(kv_dtype).max)
        encoded = jnp.clip(values.astype(jnp.float32), -largest, largest).astype(kv_dtype)
    else:
        encoded = values.astype(kv_dtype)
    return encoded if encoded.dtype == storage else jax.lax.bitcast_convert_type(encoded, storage)


def quantize(values: jax.Array, scale: Any, storage: Any, kv_dtype: jnp.dtype) -> jax.Array:
    """``encode(values / scale)`` for values [..., kv_heads, head_dim] and a scale None, [] or [kv_heads]."""
    if scale is not None:
        values = values.astype(jnp.float32) / per_head(scale)[..., None]
    return encode(values, storage, kv_dtype)


def dequantize(stored: jax.Array, scale: Any, kv_dtype: jnp.dtype) -> jax.Array:
    """float32 values of stored elements [..., kv_heads, head_dim] and a scale None, [] or [kv_heads]."""
    values = decode(stored, kv_dtype)
    return values if scale is None else values * per_head(scale)[..., None]


def per_head(scale: Any) -> jax.Array:
    """A scale as float32, of shape [] or [kv_heads]."""
    return jnp.asarray(scale, jnp.float32)
