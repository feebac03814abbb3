"""A pool of more than 2**31 elements: no index is ever a number of elements."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention, paged_copy, paged_gather, paged_write


def test_pages_beyond_two_to_the_31_elements() -> None:
    """Write, copy, gather and attend at the far end of 2.1 GiB of one-byte elements; K and V are one array."""
    shape = (16_400, 8, 8, 2048)  # 2**17 elements a page
    last = shape[0] - 1
    pages = jax.jit(lambda: jnp.zeros(shape, jnp.uint8))()
    assert pages.size > 2**31
    rng = np.random.default_rng(0)
    k = rng.integers(1, 120, (3, 8, 2048)).astype(np.float32)
    slots = np.array([last * 8 + 7, (last - 1) * 8, 2**31 - 1], np.int32)

    def write(pages: jax.Array) -> jax.Array:
        # The small V pool takes the same slots, most of which it does not have.
        small = jnp.zeros((shape[0], 8, 8, 1), jnp.uint8)
        return paged_write(pages, small, k, k[..., :1], slots, kv_dtype="int8")[0]

    pages = jax.jit(write, donate_argnums=0)(pages)
    pages = jax.jit(paged_copy, donate_argnums=0)(pages, np.array([last], np.int32), np.array([last - 2], np.int32))
    for page in (last, last - 2):
        read = np.asarray(paged_gather(pages, np.array([page], np.int32)))[0]
        chex.assert_trees_all_equal(read[:, 7], k[0].astype(np.uint8))
        assert not read[:, :7].any()
    assert not np.asarray(paged_gather(pages, np.arange(8, dtype=np.int32))).any()
    q = rng.standard_normal((1, 8, 2048)).astype(np.float32) * 1e-3
    table = np.array([[last - 1]], np.int32)
    out = paged_attention(q, pages, pages, table, np.array([1], np.int32), kv_dtype="int8")
    chex.assert_trees_all_close(np.asarray(out)[0], k[1], rtol=1e-6)
