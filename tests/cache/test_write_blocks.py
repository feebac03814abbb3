"""Whole blocks written into pages: the way back of ``gather_blocks``, on CPUs' way and on the others'."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import DType, KVCacheConfig, KVPages, ShapeMismatchError
from pyagent_kv_jax.cache import kv_pages

CONFIG = KVCacheConfig(2, 2, 8, num_blocks=5, block_size=8, kernel_block_size=4, v_head_dim=4, dtype=DType.FLOAT32)


def poisoned():
    pages = KVPages.create(CONFIG)
    return dataclasses.replace(pages, k_pages=pages.k_pages * jnp.nan, v_pages=pages.v_pages * jnp.nan)


def random_blocks(count, dim):
    return np.random.default_rng(dim).normal(size=(2, count, 2, 8, dim)).astype(np.float32)


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("as_bits", [True, False])
def test_blocks_come_back_and_nothing_else_changes(monkeypatch, loop, as_bits):
    with_pages = kv_pages._with_pages
    monkeypatch.setattr(kv_pages, "_with_pages", lambda *args, **_: with_pages(*args, loop=loop))
    k, v = random_blocks(4, 8), random_blocks(4, 4)
    given = (x.view(np.uint32) if as_bits else x for x in (k, v))
    ids = np.array([3, -1, 0, 99], np.int32)  # -1 and what is no block are left out
    pages = jax.jit(lambda *args: KVPages.write_blocks(*args))(poisoned(), ids, *given)
    for stored, written in ((pages.k_pages, k), (pages.v_pages, v)):
        # [layers, blocks, pages of a block, heads, page_size, dim]
        found = np.asarray(stored).reshape(2, 5, 2, 2, 4, -1)
        for at, block in ((0, 3), (2, 0)):
            expected = written[:, at].reshape(2, 2, 2, 4, -1).swapaxes(1, 2)
            np.testing.assert_array_equal(found[:, block], expected)
        assert np.isnan(found[:, [1, 2, 4]]).all()
    back = pages.gather_blocks(jnp.array([0, 3]))
    np.testing.assert_array_equal(back[0], k[:, [2, 0]])
    np.testing.assert_array_equal(back[1], v[:, [2, 0]])


@pytest.mark.parametrize(
    ("k", "v", "wanted"),
    [
        (random_blocks(2, 8), random_blocks(3, 4), r"v: got float32\[2, 3, 2, 8, 4\], want float32\[2, 2, 2, 8, 4\]"),
        (random_blocks(2, 4), random_blocks(2, 4), "k: got"),
        (random_blocks(2, 8).astype(np.float16), random_blocks(2, 4), "k: got float16"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(k, v, wanted):
    with pytest.raises(ShapeMismatchError, match=wanted):
        KVPages.create(CONFIG).write_blocks(jnp.array([0, 1]), k, v)
