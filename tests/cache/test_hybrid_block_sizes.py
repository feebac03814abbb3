"""Blocks of several pages: the same answers and the same bytes as with one page a block."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import (
    ConfigError,
    KVCacheConfig,
    KVCacheTransfer,
    KVPages,
    LayerGroup,
    PagedKVCache,
    ShapeMismatchError,
)
from pyagent_kv_jax.cache.host_pages import HostPages, swap_in, swap_out
from pyagent_kv_jax.cache.kv_pages import clear_blocks_in_place, copy_blocks_in_place
from tests.cache.dense_reference import DenseReference

ROWS, LAYERS, Q_HEADS, KV_HEADS, DIM, BLOCK, PAGE, BLOCKS = 3, 2, 4, 2, 8, 16, 4, 6
HEADS = (Q_HEADS, KV_HEADS, KV_HEADS)  # of q, k and v
PLAIN = KVCacheConfig(
    num_layers=LAYERS,
    num_heads=KV_HEADS,
    head_dim=DIM,
    num_blocks=BLOCKS,
    block_size=BLOCK,
    max_num_reqs=ROWS,
    max_model_len=48,
)
HYBRID = dataclasses.replace(PLAIN, kernel_block_size=PAGE)
LEFT_OVER = dataclasses.replace(HYBRID, num_kernel_blocks=27)  # three pages of each layer belong to no block


@partial(jax.jit, donate_argnums=0)
def step(cache: PagedKVCache, lens: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    cache, meta = cache.extend(lens, num_tokens=q.shape[1])

    def layer(cache: PagedKVCache, inputs: tuple) -> tuple[PagedKVCache, jax.Array]:
        out, cache = cache.attend(*inputs, meta)
        return cache, out

    cache, outs = jax.lax.scan(layer, cache, (jnp.arange(LAYERS), q, k, v))
    return cache, outs, meta


def filled(config: KVCacheConfig, seed: int = 0) -> KVPages:
    """Random numbers in every page."""
    rng, pages = np.random.default_rng(seed), KVPages.create(config)
    k, v = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (pages.k_pages, pages.v_pages))
    return dataclasses.replace(pages, k_pages=k, v_pages=v)


def blocks_of(pages: KVPages) -> np.ndarray:
    """[K or V, layers, blocks, heads, block_size, dim], read page by page, and without the pages left over."""
    config = pages.config
    out = np.zeros((2, LAYERS, config.pool_blocks, KV_HEADS, config.block_size, DIM), np.float32)
    for kind, stored in enumerate((np.asarray(pages.k_pages), np.asarray(pages.v_pages))):
        by_layer = stored.reshape(LAYERS, -1, *stored.shape[1:])
        for block, piece in np.ndindex(config.pool_blocks, config.block_size // config.page_size):
            at = slice(piece * config.page_size, (piece + 1) * config.page_size)
            out[kind, :, block, :, at] = by_layer[:, block * (config.block_size // config.page_size) + piece]
    return out


def left_over(pages: KVPages) -> np.ndarray:
    used = pages.config.pool_blocks * BLOCK // PAGE
    return np.stack([np.asarray(x).reshape(LAYERS, -1, *x.shape[1:])[:, used:] for x in (pages.k_pages, pages.v_pages)])


def test_attention_is_that_of_a_dense_cache() -> None:
    rng, references = np.random.default_rng(0), [DenseReference(ROWS) for _ in range(LAYERS)]
    cache = PagedKVCache.create(LEFT_OVER)  # NaN, so that reading what was never written shows
    cache = dataclasses.replace(cache, pages=jax.tree.map(lambda x: x * jnp.nan, cache.pages))
    for lens in ([17, 3, 0], [1, 0, 14], [2, 1, 1]):
        q, k, v = (rng.normal(size=(LAYERS, 32, heads, DIM)).astype(np.float32) for heads in HEADS)
        cache, outs, meta = step(cache, np.array(lens), q, k, v)
        assert meta.ok.all()
        assert meta.block_tables.shape == (ROWS, 3)  # of blocks, not of pages
        starts = np.cumsum([0, *lens])
        for layer, row in np.ndindex(LAYERS, ROWS):
            at = slice(starts[row], starts[row + 1])
            want = references[layer].attend(row, q[layer, at], k[layer, at], v[layer, at])
            np.testing.assert_allclose(outs[layer, at], want, atol=1e-5)
    for layer, row in np.ndindex(LAYERS, ROWS):
        tokens = len(references[layer].k[row])
        blocks = blocks_of(cache.pages)[:, layer, np.asarray(cache.table.blocks)[row, : -(-tokens // BLOCK)]]
        stored = blocks.swapaxes(2, 3).reshape(2, -1, KV_HEADS, DIM)[:, :tokens]
        np.testing.assert_array_equal(
            stored, np.array([references[layer].k[row], references[layer].v[row]], np.float32)
        )
    assert np.isnan(left_over(cache.pages)).all()


def test_blocks_are_copied_cleared_and_gathered_whole() -> None:
    pages = filled(LEFT_OVER)
    want, untouched = blocks_of(pages), left_over(pages)
    k, v = pages.gather_blocks(jnp.array([4, -1, 0]))
    np.testing.assert_array_equal(np.stack([k, v])[:, :, [0, 2]], want[:, :, [4, 0]])
    np.testing.assert_array_equal(np.stack([k, v])[:, :, 1], 0)
    pages = copy_blocks_in_place(pages, np.array([1, 2, -1, 3, BLOCKS], np.int32), np.array([2, 1, 0, 5, 0], np.int32))
    want[:, :, [2, 1, 5]] = want[:, :, [1, 2, 3]]
    pages = clear_blocks_in_place(pages, np.array([4, -1, BLOCKS], np.int32))
    want[:, :, 4] = 0
    np.testing.assert_array_equal(blocks_of(pages), want)
    np.testing.assert_array_equal(left_over(pages), untouched)


def test_the_same_pages_in_blocks_of_another_size() -> None:
    """Only the names change: block 1 of 16 tokens is blocks 4 to 7 of 4, and those left over have names too."""
    pages = filled(LEFT_OVER)
    want, last = blocks_of(pages), left_over(pages)
    small = dataclasses.replace(pages, config=LEFT_OVER.with_block_size(4))
    small = copy_blocks_in_place(small, np.array([5, 26, 27, -1], np.int32), np.array([26, 2, 0, 1], np.int32))
    moved = want[:, :, 1, :, 4:8].copy()
    want[:, :, 0, :, 8:12], last[:, :, 2] = last[:, :, 2], moved
    pages = dataclasses.replace(small, config=LEFT_OVER)
    np.testing.assert_array_equal(blocks_of(pages), want)
    np.testing.assert_array_equal(left_over(pages), last)


def test_swapped_blocks_come_back_as_they_were() -> None:
    pages, other = filled(LEFT_OVER), filled(LEFT_OVER, seed=1)
    before, want, untouched = blocks_of(pages), blocks_of(other), left_over(other)
    transfer = KVCacheTransfer(LEFT_OVER, 4)
    transfer.swap_out(pages, [5, 0, 3], [1, 3, 0])
    assert transfer.host.num_blocks == 4
    assert transfer.host.nbytes == 4 * LEFT_OVER.block_size_bytes()
    back = transfer.swap_in(other, [3, 1], [4, 2])
    want[:, :, [4, 2]] = before[:, :, [0, 5]]
    np.testing.assert_array_equal(blocks_of(back), want)
    np.testing.assert_array_equal(left_over(back), untouched)
    traced = jax.jit(swap_out)(pages, HostPages.create(LEFT_OVER, 4), np.array([5, -1, 3]), np.array([2, 0, 1]))
    again = KVCacheTransfer(LEFT_OVER, 4)
    again._host = traced
    np.testing.assert_array_equal(blocks_of(again.swap_in(back, [2], [0]))[:, :, 0], before[:, :, 5])
    with pytest.raises(ShapeMismatchError, match=r"got 1 pages a block, want 4"):
        swap_out(pages, HostPages.create(dataclasses.replace(PLAIN, block_size=PAGE), 4), [0], [0])


def test_what_changes_changes_in_place() -> None:
    large = dataclasses.replace(HYBRID, num_blocks=4096)
    pages = KVPages.create(large)
    ids, tokens = np.arange(8, dtype=np.int32), np.zeros((8, KV_HEADS, DIM), np.float32)
    host = HostPages.create(large, 8)
    programs = {
        "copy": copy_blocks_in_place.lower(pages, ids, ids[::-1]),
        "clear": clear_blocks_in_place.lower(pages, ids),
        "write": jax.jit(KVPages.write, donate_argnums=0).lower(pages, 1, tokens, tokens, ids),
        "swap in": jax.jit(
            lambda pages, host, ids: dataclasses.replace(pages, **_swapped_in(host, pages, ids)), donate_argnums=0
        ).lower(pages, host, ids),
    }
    for name, lowered in programs.items():
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= pages.nbytes, name
        assert memory.temp_size_in_bytes < pages.nbytes / 50, name


def _swapped_in(host: HostPages, pages: KVPages, ids: jax.Array) -> dict[str, jax.Array]:
    moved = swap_in(host, pages, ids, ids)
    return {"k_pages": moved.k_pages, "v_pages": moved.v_pages}


def test_several_layer_groups() -> None:
    """A group's layer is its place in the group, and its pages are found by the group's own table."""
    groups = (LayerGroup((0,), sliding_window=5), LayerGroup((1,)))
    config = dataclasses.replace(LEFT_OVER, layer_groups=groups, num_kernel_blocks=25)
    pages = filled(config)
    k, v = np.random.default_rng(3).normal(size=(2, 1, KV_HEADS, DIM)).astype(np.float32)
    pages = jax.jit(KVPages.write)(pages, 1, k, v, np.array([5 * BLOCK + 7]))
    np.testing.assert_array_equal(np.asarray(pages.k_pages)[5 * 4 + 1, :, 3], k[0])


def test_sizes() -> None:
    assert (PLAIN.page_size, PLAIN.pages_per_block, PLAIN.pages_per_layer) == (16, 1, 6)
    assert (LEFT_OVER.page_size, LEFT_OVER.pages_per_block, LEFT_OVER.pages_per_layer) == (4, 4, 27)
    assert LEFT_OVER.table_config().blocks_per_kv_block == 4
    assert LEFT_OVER.num_slots == 2 * 27 * 4
    assert KVPages.create(LEFT_OVER).k_pages.shape == (54, KV_HEADS, PAGE, DIM)
    smaller = LEFT_OVER.with_block_size(12)
    assert (smaller.pool_blocks, smaller.pages_per_layer, smaller.num_kernel_blocks) == (9, 27, None)
    assert HYBRID.with_block_size(4).with_block_size(16) == HYBRID
    assert PLAIN.with_block_size(32).with_block_size(16) == PLAIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_block_size": 5}, r"kernel_block_size: got 5, want a divisor of block_size 16"),
        ({"kernel_block_size": 32}, r"kernel_block_size: got 32, want a divisor of block_size 16"),
        ({"kernel_block_size": 0}, r"kernel_block_size: got 0, want a positive integer"),
        ({"num_kernel_blocks": 23}, r"num_kernel_blocks: got 23, want at least the 24 of 6 blocks of 4"),
        ({"num_kernel_blocks": True}, r"num_kernel_blocks: got True, want a positive integer"),
    ],
)
def test_sizes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(HYBRID, **change)


@pytest.mark.parametrize("size", [0, -4, 6, 4 * 25, 8.0, True])
def test_block_sizes_that_cannot_be(size: object) -> None:
    with pytest.raises(ConfigError, match=r"block_size"):
        HYBRID.with_block_size(size)
