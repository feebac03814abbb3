"""Number formats inside Triton kernels: ``number_format`` again, with what Triton has.

Triton has no rounding primitive, and no fp8 before compute capability 8.9, where the bits are moved by hand. All of it
is plain ``jax.numpy``, so tests compare every value with ``number_format``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.nvidia import Gpu
from pallas_kernels.words import UNSIGNED, as_pairs, overflows_offsets

_FP8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


def viewed(pages: jax.Array, kv_dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    """The same pages as kernels load them: elements as ``convertible`` has them, or uint16 words of two.

    Words where single elements cannot be reached, and where fp8 is converted by hand: that takes fewer registers.

    Raises:
        NotImplementedError: elements cannot be reached, and a row of the pages has an odd number of them.
    """
    in_pairs = _is_converted_by_hand(kv_dtype, gpu) and pages.shape[-1] % 2 == 0
    return as_pairs(pages) if in_pairs or overflows_offsets(pages) else convertible(pages, kv_dtype, gpu)


def convertible(stored: jax.Array, kv_dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    """Stored elements as ``kv_dtype``, or as uint8 where that is an fp8 this GPU cannot convert."""
    seen = jnp.dtype(jnp.uint8) if _is_converted_by_hand(kv_dtype, gpu) else kv_dtype
    return stored if stored.dtype == seen else jax.lax.bitcast_convert_type(stored, seen)


def _is_converted_by_hand(kv_dtype: jnp.dtype, gpu: Gpu) -> bool:
    return kv_dtype in _FP8 and not gpu.converts_fp8


def multiplied(q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> jnp.dtype:
    """What the matrix units multiply: q's dtype or the pages', whichever holds both; one byte fits either."""
    return q_dtype if kv_dtype.itemsize == 1 else jnp.promote_types(q_dtype, kv_dtype)


def stored_columns(dims: Any, pages: Any, kv_dtype: jnp.dtype) -> Any:
    """Where the numbers ``dims``, a slice, lie in a row of ``pages``, which may hold words of two."""
    in_a_word = pages.dtype.itemsize // kv_dtype.itemsize
    return pl.ds(dims.start // in_a_word, dims.size // in_a_word)


def split_pairs(words: jax.Array) -> jax.Array:
    """uint16[..., n] as uint8[..., 2 n]: the numbers of ``words.as_pairs``."""
    low, high = ((words >> shift).astype(jnp.uint8)[..., None] for shift in (jnp.uint16(0), jnp.uint16(8)))
    return jax.lax.concatenate([low, high], words.ndim).reshape(*words.shape[:-1], -1)


def join_pairs(bits: jax.Array) -> jax.Array:
    """uint8[..., 2 n] as uint16[..., n]: the words of ``words.as_pairs``."""
    pairs = bits.astype(jnp.uint16).reshape(*bits.shape[:-1], -1, 2)
    low, high = jax.lax.split(pairs, (1, 1), axis=bits.ndim)
    return (low | (high << jnp.uint16(8))).reshape(pairs.shape[:-1])


def decode(stored: jax.Array, kv_dtype: jnp.dtype, dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    """Elements as loaded from ``viewed`` pages, as numbers of ``dtype``, any scale not yet applied."""
    if stored.dtype.itemsize > kv_dtype.itemsize:
        stored = convertible(split_pairs(stored), kv_dtype, gpu)
    if stored.dtype == kv_dtype:
        return stored.astype(dtype)
    # Both fp8 formats are float16 with fewer bits; e4m3 also has another bias, so its value there is 2**8 too small.
    wide = stored.astype(jnp.uint16)
    if kv_dtype == jnp.float8_e5m2:
        return jax.lax.bitcast_convert_type(wide << 8, jnp.float16).astype(dtype)
    magnitude = wide & jnp.uint16(0x7F)
    bits = ((wide & jnp.uint16(0x80)) << 8) | (magnitude << 7)
    values = jax.lax.bitcast_convert_type(bits, jnp.float16) * jnp.float16(256)
    return jnp.where(magnitude == 0x7F, jnp.float16(jnp.nan), values).astype(dtype)


def encode(values: jax.Array, kv_dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    """float32 numbers, any scale already divided out, as unsigned bits of ``kv_dtype``."""
    encoded = _encode(values, kv_dtype, gpu)
    bits = UNSIGNED[kv_dtype.itemsize]
    return encoded if encoded.dtype == bits else jax.lax.bitcast_convert_type(encoded, bits)


def _encode(values: jax.Array, kv_dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    if kv_dtype == jnp.int8:
        rounded = round_half_to_even(jnp.minimum(jnp.maximum(values, -128.0), 127.0))
        return jnp.where(values != values, 0.0, rounded).astype(jnp.int32).astype(jnp.int8)
    if kv_dtype not in _FP8:
        return values.astype(kv_dtype)
    largest = float(jnp.finfo(kv_dtype).max)
    saturated = jnp.where(values != values, values, jnp.minimum(jnp.maximum(values, -largest), largest))
    return saturated.astype(kv_dtype) if gpu.converts_fp8 else _encode_fp8(saturated, _LAYOUTS[kv_dtype])


class _Layout(NamedTuple):
    """An fp8 format: bits of its mantissa, exponent bias, and the bits of its NaN."""

    mantissa: int
    bias: int
    nan: int


_LAYOUTS = {_FP8[0]: _Layout(3, 7, 0x7F), _FP8[1]: _Layout(2, 15, 0x7E)}


def _encode_fp8(values: jax.Array, layout: _Layout) -> jax.Array:
    """Finite float32 in range, or NaN, as uint8 bits, rounded half to even."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 24) & 0x80
    dropped = 23 - layout.mantissa
    odd = (magnitude >> dropped) & 1
    normal = ((magnitude + (1 << (dropped - 1)) - 1 + odd) >> dropped) - ((127 - layout.bias) << layout.mantissa)
    # Below the smallest normal number the steps are all alike: count them.
    step = 2.0 ** (1 - layout.bias - layout.mantissa)
    size = jnp.maximum(values, -values)
    steps = round_half_to_even(jnp.minimum(size, 1.0) / step).astype(jnp.int32)
    number = jnp.where(size < 2.0 ** (1 - layout.bias), steps, normal)
    return jnp.where(values != values, layout.nan, number | sign).astype(jnp.uint8)


def round_half_to_even(values: jax.Array) -> jax.Array:
    """As ``jnp.round``, for float32 of magnitude under 2**22."""
    below = jnp.floor(values)
    rest = values - below
    is_odd = below - 2 * jnp.floor(below * 0.5) != 0
    return jnp.where((rest > 0.5) | ((rest == 0.5) & is_odd), below + 1, below)
