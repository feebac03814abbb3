"""Pages as rows of machine words: what moves them need not know what they hold.

XLA on a GPU makes of these views no more than another name for the same buffer, also where it is donated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

UNSIGNED = {1: jnp.dtype(jnp.uint8), 2: jnp.dtype(jnp.uint16), 4: jnp.dtype(jnp.uint32)}


def as_bits(pages: jax.Array) -> jax.Array:
    """The same pages, elements as unsigned integers of their width."""
    return jax.lax.bitcast_convert_type(pages, UNSIGNED[pages.dtype.itemsize])


def as_words(pages: jax.Array) -> jax.Array:
    """Pages [pages, ...] as unsigned words [pages, words], of 4 bytes where a page has a multiple of 4.

    Triton computes an offset in 32 bits, signed, where an array has no more than 2**32 bytes: with words of one
    byte that would be one bit short.
    """
    bits = as_bits(pages).reshape(pages.shape[0], -1)
    in_a_word = 4 // pages.dtype.itemsize
    if in_a_word == 1 or bits.shape[1] % in_a_word:
        return bits
    return jax.lax.bitcast_convert_type(bits.reshape(pages.shape[0], -1, in_a_word), jnp.uint32)


def from_words(words: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The pages of ``as_words`` again, ``shape`` [any number of pages, ...]."""
    dtype = jnp.dtype(dtype)
    if words.dtype.itemsize != dtype.itemsize:
        words = jax.lax.bitcast_convert_type(words, UNSIGNED[dtype.itemsize])
    return jax.lax.bitcast_convert_type(words.reshape(shape), dtype)
