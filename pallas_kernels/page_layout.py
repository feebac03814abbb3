"""Our pages to and from the layouts of others. Each is one transpose: for hand-over, not for hot paths.

Ours is ``[pages, kv_heads, block_size, head_dim]``, one array for K and one for V: each (page, head) is one
contiguous tile. A layer of a pool of several layers is pages ``layer * num_blocks`` to ``(layer + 1) *
num_blocks``; slice it off first if the other side keeps layers apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import require_array, require_pages, require_shape, same_dtype
from pallas_kernels.errors import require


def to_heads_first(pages: jax.Array) -> jax.Array:
    """[pages, kv_heads, block_size, d] to [kv_heads, pages, block_size, d], of JAX's own paged attention."""
    require_pages("pages", pages)
    return jnp.swapaxes(pages, 0, 1)


def from_heads_first(pages: jax.Array) -> jax.Array:
    """[kv_heads, pages, block_size, d], of JAX's own paged attention, to [pages, kv_heads, block_size, d]."""
    require_array("pages", pages, "[kv_heads, pages, block_size, head_dim]", 4)
    return jnp.swapaxes(pages, 0, 1)


def to_nhd(pages: jax.Array) -> jax.Array:
    """[pages, kv_heads, block_size, d] to [pages, block_size, kv_heads, d]: NHD, of vLLM and FlashInfer."""
    require_pages("pages", pages)
    return jnp.swapaxes(pages, 1, 2)


def from_nhd(pages: jax.Array) -> jax.Array:
    """[pages, block_size, kv_heads, d], NHD of vLLM and FlashInfer, to [pages, kv_heads, block_size, d]."""
    require_array("pages", pages, "[pages, block_size, kv_heads, head_dim]", 4)
    return jnp.swapaxes(pages, 1, 2)


def to_interleaved(k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
    """K and V [pages, kv_heads, block_size, d] to one array [pages, block_size, 2 * kv_heads, d].

    Head h of K is at 2h and of V at 2h + 1: the layout of Ragged Paged Attention v2 and of Levanter.
    """
    require_pages("k_pages", k_pages)
    require_pages("v_pages", v_pages)
    require_shape("v_pages", v_pages, k_pages.shape, "the shape of k_pages")
    same_dtype("k_pages", k_pages, "v_pages", v_pages)
    pages, kv_heads, block_size, head_dim = k_pages.shape
    stacked = jnp.stack([to_nhd(k_pages), to_nhd(v_pages)], axis=3)
    return stacked.reshape(pages, block_size, 2 * kv_heads, head_dim)


def from_interleaved(kv_pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[pages, block_size, 2 * kv_heads, d], K even and V odd, to K and V [pages, kv_heads, block_size, d]."""
    want = "[pages, block_size, 2 * kv_heads, head_dim]"
    require_array("kv_pages", kv_pages, want, 4)
    require(kv_pages.shape[2] % 2 == 0, "kv_pages", kv_pages, want)
    return from_nhd(kv_pages[:, :, 0::2]), from_nhd(kv_pages[:, :, 1::2])
