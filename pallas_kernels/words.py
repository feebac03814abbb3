"""Pages as rows of machine words: what moves them need not know what they hold.

XLA on a GPU makes of these views no more than another name for the same buffer, also where it is donated.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

UNSIGNED = {1: jnp.dtype(jnp.uint8), 2: jnp.dtype(jnp.uint16), 4: jnp.dtype(jnp.uint32)}


def as_bits(pages: jax.Array) -> jax.Array:
    """The same pages, elements as unsigned integers of their width."""
    return jax.lax.bitcast_convert_type(pages, UNSIGNED[pages.dtype.itemsize])


def overflows_offsets(pages: jax.Array) -> bool:
    """Whether an offset into these pages, in elements, may be more than Triton gets.

    Pallas gives it 64 bits for an array of more than 2**32 bytes and 32, signed, for any other: one bit too few for
    2 to 4 GiB of one-byte elements.
    """
    return pages.dtype.itemsize == 1 and 2**31 < pages.size <= 2**32


def require_pairs(pages: jax.Array, size: int) -> None:
    """Raise ``NotImplementedError`` if ``size`` elements of a row are no whole words of two."""
    if size % 2:
        raise NotImplementedError(
            f"pages {pages.shape}: Triton reaches {pages.size} one-byte elements only two by two, want an even number "
            f"of them in a row, not {size}"
        )


def as_pairs(pages: jax.Array) -> jax.Array:
    """Pages [..., D] of one-byte elements as uint16[..., D / 2]; the lower byte is the first of the two."""
    require_pairs(pages, pages.shape[-1])
    return _joined(as_bits(pages), 2)


def as_words(pages: jax.Array) -> jax.Array:
    """Pages [pages, ...] as unsigned words [pages, words], of 4 bytes, or of 2 or 1 where those do not fit a page."""
    bits = as_bits(pages).reshape(pages.shape[0], -1)
    if overflows_offsets(pages):
        require_pairs(pages, bits.shape[1])
    itemsize = bits.dtype.itemsize
    return _joined(bits, math.gcd(4, bits.shape[1] * itemsize) // itemsize)


def _joined(bits: jax.Array, number: int) -> jax.Array:
    """``number`` neighbours, of the last axis, as one word."""
    if number == 1:
        return bits
    neighbours = bits.reshape(*bits.shape[:-1], -1, number)
    return jax.lax.bitcast_convert_type(neighbours, UNSIGNED[bits.dtype.itemsize * number])


def from_words(words: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The pages of ``as_words`` again, ``shape`` [any number of pages, ...]."""
    dtype = jnp.dtype(dtype)
    if words.dtype.itemsize != dtype.itemsize:
        words = jax.lax.bitcast_convert_type(words, UNSIGNED[dtype.itemsize])
    return jax.lax.bitcast_convert_type(words.reshape(shape), dtype)
