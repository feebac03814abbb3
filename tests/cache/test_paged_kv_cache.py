"""``PagedKVCache`` as a user's step function uses it: extend once, attend in every layer, free."""

from __future__ import annotations

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import (
    AttentionMetadata,
    DType,
    InvalidArgumentError,
    KVCacheConfig,
    OutOfBlocksError,
    PagedKVCache,
    RequestTooLongError,
    ShapeMismatchError,
    SlotMapping,
    UnknownRequestError,
)
from tests.cache.dense_reference import DenseReference

ROWS, LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 2, 4, 2, 8
CONFIG = KVCacheConfig(
    num_layers=LAYERS,
    num_heads=KV_HEADS,
    head_dim=DIM,
    num_blocks=13,
    block_size=4,
    max_num_reqs=ROWS,
    max_model_len=24,
)


def random_tokens(rng: np.random.Generator, tokens: int, dtype: np.dtype = np.float32) -> tuple[np.ndarray, ...]:
    shapes = [(LAYERS, tokens, heads, DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


@partial(jax.jit, donate_argnums=0, static_argnames="num_tokens")
def step(
    cache: PagedKVCache, lens: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: int | None
) -> tuple[PagedKVCache, jax.Array, AttentionMetadata]:
    cache, meta = cache.extend(lens, num_tokens=num_tokens)

    def layer(cache: PagedKVCache, inputs: tuple) -> tuple[PagedKVCache, jax.Array]:
        out, cache = cache.attend(*inputs, meta)
        return cache, out

    cache, outs = jax.lax.scan(layer, cache, (jnp.arange(LAYERS), q, k, v))
    return cache, outs, meta


def poisoned(cache: PagedKVCache) -> PagedKVCache:
    """NaN in every page, so that reading what was never written shows."""
    pages = cache.pages
    nan = dataclasses.replace(pages, k_pages=pages.k_pages * jnp.nan, v_pages=pages.v_pages * jnp.nan)
    return dataclasses.replace(cache, pages=nan)


def test_ragged_steps_agree_with_a_dense_cache() -> None:
    rng = np.random.default_rng(0)
    cache = poisoned(PagedKVCache.create(CONFIG))
    references = [DenseReference(ROWS) for _ in range(LAYERS)]
    for lens in ([5, 0, 3], [1, 8, 0], [2, 1, 7], [0, 0, 0], [9, 1, 1]):
        q, k, v = random_tokens(rng, 16)
        cache, outs, meta = step(cache, jnp.array(lens), q, k, v, 16)
        assert meta.ok.all()
        starts = np.asarray(meta.query_start_loc)
        assert starts.tolist() == np.cumsum([0, *lens]).tolist()
        for layer, row in np.ndindex(LAYERS, ROWS):
            at = slice(starts[row], starts[row + 1])
            want = references[layer].attend(row, q[layer, at], k[layer, at], v[layer, at])
            np.testing.assert_allclose(outs[layer, at], want, atol=1e-5)
        np.testing.assert_array_equal(outs[:, starts[-1] :], 0)
        cache.check_invariants()


def test_decode_steps_agree_with_a_dense_cache() -> None:
    rng = np.random.default_rng(1)
    cache = poisoned(PagedKVCache.create(CONFIG))
    references = [DenseReference(ROWS) for _ in range(LAYERS)]
    for _ in range(9):
        lens = rng.integers(0, 2, ROWS)
        q, k, v = random_tokens(rng, ROWS)
        cache, outs, meta = step(cache, jnp.array(lens), q, k, v, None)
        for layer, row in np.ndindex(LAYERS, ROWS):
            at = slice(row, row + int(lens[row]))
            want = references[layer].attend(row, q[layer, at], k[layer, at], v[layer, at])
            np.testing.assert_allclose(outs[layer, at], want, atol=1e-5)
        np.testing.assert_array_equal(outs[:, lens == 0], 0)
        np.testing.assert_array_equal(meta.slot_mapping[lens == 0], -1)


def test_a_refused_row_keeps_its_place_and_touches_nothing() -> None:
    rng = np.random.default_rng(2)
    cache = poisoned(PagedKVCache.create(CONFIG))
    q, k, v = random_tokens(rng, 64)
    cache, _, _ = step(cache, jnp.array([21, 17, 1]), q, k, v, 64)  # 6 + 5 + 1 of 13 blocks, row 0 nearly full
    before = jax.tree.map(np.array, cache)
    q, k, v = random_tokens(rng, 16)
    cache, outs, meta = step(cache, jnp.array([4, 4, 5]), q, k, v, 16)
    assert meta.ok.tolist() == [False, True, False]  # too long for the row; served; no block left
    assert meta.query_start_loc.tolist() == [0, 4, 8, 13]
    np.testing.assert_array_equal(meta.slot_mapping[:4], -1)
    np.testing.assert_array_equal(meta.slot_mapping[8:], -1)
    assert np.abs(outs[:, 4:8]).min() > 0
    np.testing.assert_array_equal(outs[:, :4], 0)
    np.testing.assert_array_equal(outs[:, 8:], 0)
    np.testing.assert_array_equal(cache.table.blocks[0], before.table.blocks[0])
    np.testing.assert_array_equal(cache.table.blocks[2], before.table.blocks[2])
    written = np.asarray(meta.slot_mapping[4:8])
    for new, old in ((cache.pages.k_pages, before.pages.k_pages), (cache.pages.v_pages, before.pages.v_pages)):
        new, old = (np.array(x).reshape(LAYERS, 13, KV_HEADS, 4, DIM) for x in (new, old))
        new[:, written // 4, :, written % 4] = old[:, written // 4, :, written % 4]
        np.testing.assert_array_equal(new, old)
    cache.check_invariants()


@pytest.mark.parametrize(
    ("lens", "num_tokens", "ok"),
    [
        ([1, 2, 1], None, [True, False, True]),  # two tokens in decode layout
        ([1, -1, 1], None, [True, False, True]),
        ([3, 3, 3], 8, [True, True, False]),  # more tokens than the step's arrays hold
        ([3, -3, 3], 8, [True, False, True]),
        ([25, 3, 3], 64, [False, True, True]),  # longer than a row
    ],
)
def test_bad_counts_under_jit_are_refused(lens: list[int], num_tokens: int | None, ok: list[bool]) -> None:
    cache = PagedKVCache.create(CONFIG)
    new, meta = jax.jit(partial(PagedKVCache.extend, num_tokens=num_tokens))(cache, jnp.array(lens))
    assert meta.ok.tolist() == ok
    granted = np.where(ok, lens, 0)
    assert new.table.num_tokens.tolist() == granted.tolist()
    assert (np.asarray(meta.slot_mapping) >= 0).sum() == granted.sum()
    new.check_invariants()


def test_order_decides_who_is_served() -> None:
    cache = PagedKVCache.create(dataclasses.replace(CONFIG, num_blocks=5))
    _, meta = cache.extend(jnp.array([9, 9, 9]), num_tokens=32, order=jnp.array([2, 0, 1]))
    assert meta.ok.tolist() == [False, False, True]


def test_256_decode_steps_in_one_scan() -> None:
    config = KVCacheConfig(
        num_layers=1, num_heads=1, head_dim=4, num_blocks=70, block_size=8, max_num_reqs=2, max_model_len=272
    )
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(256, 2, 1, 4)), jnp.float32) for _ in range(3))

    @chex.assert_max_traces(n=1)
    def decode(cache: PagedKVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[PagedKVCache, jax.Array]:
        def one(cache: PagedKVCache, inputs: tuple) -> tuple[PagedKVCache, tuple[jax.Array, jax.Array]]:
            cache, meta = cache.extend(jnp.ones(2, jnp.int32))
            out, cache = cache.attend(0, *inputs, meta)
            return cache, (out, meta.ok)

        return jax.lax.scan(one, cache, (q, k, v))

    jaxpr = str(jax.make_jaxpr(lambda *args: decode.__wrapped__(*args))(PagedKVCache.create(config), q, k, v))
    assert "callback" not in jaxpr
    run = jax.jit(decode, donate_argnums=0)
    cache, (outs, ok) = run(poisoned(PagedKVCache.create(config)), q, k, v)
    assert ok.all()
    assert cache.table.num_blocks.tolist() == [32, 32]
    for row in range(2):
        want = DenseReference(1).attend(0, *(np.asarray(x[:, row]) for x in (q, k, v)))
        np.testing.assert_allclose(outs[:, row], want, atol=1e-5)
    cache.check_invariants()
    run(poisoned(PagedKVCache.create(config)), q + 1, k, v)  # same shapes: nothing is traced again


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.INT8, DType.FP8])
def test_a_donated_step_copies_neither_pages_nor_pool(dtype: DType) -> None:
    """1 GiB of pages or more, 1,000,000 blocks: the compiled step's temporaries stay tiny."""
    config = KVCacheConfig(
        num_layers=2, num_heads=1, head_dim=128, num_blocks=1_000_000, block_size=4, dtype=dtype, max_num_reqs=8
    )
    shapes = jax.eval_shape(lambda: PagedKVCache.create(config))

    def decode(cache: PagedKVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[PagedKVCache, jax.Array]:
        def one(cache: PagedKVCache, _: None) -> tuple[PagedKVCache, jax.Array]:
            cache, meta = cache.extend(jnp.ones(8, jnp.int32))

            def layer(cache: PagedKVCache, layer: jax.Array) -> tuple[PagedKVCache, jax.Array]:
                out, cache = cache.attend(layer, q, k, v, meta)
                return cache, out

            return jax.lax.scan(layer, cache, jnp.arange(2))

        return jax.lax.scan(one, cache, None, length=4)

    q, k = (jax.ShapeDtypeStruct((8, heads, 128), jnp.float32) for heads in (2, 1))
    memory = jax.jit(decode, donate_argnums=0).lower(shapes, q, k, k).compile().memory_analysis()
    size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert size >= 2**30
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(DType.FLOAT16, 4e-3), (DType.BFLOAT16, 3e-2), (DType.INT8, 5e-2), (DType.FP8, 0.2)]
)
def test_narrow_dtypes_come_close(dtype: DType, tolerance: float) -> None:
    rng = np.random.default_rng(4)
    cache = PagedKVCache.create(dataclasses.replace(CONFIG, dtype=dtype))
    if dtype is DType.INT8:
        scales = jnp.full((LAYERS, 1), 4 / 127)
        cache = dataclasses.replace(cache, pages=cache.pages.with_scales(scales, scales))
    references = [DenseReference(ROWS) for _ in range(LAYERS)]
    q, k, v = random_tokens(rng, 16)
    cache, outs, meta = step(cache, jnp.array([7, 3, 6]), q, k, v, 16)
    starts = np.asarray(meta.query_start_loc)
    for layer, row in np.ndindex(LAYERS, ROWS):
        at = slice(starts[row], starts[row + 1])
        want = references[layer].attend(row, q[layer, at], k[layer, at], v[layer, at])
        np.testing.assert_allclose(outs[layer, at], want, atol=tolerance)


def test_rows_one_at_a_time() -> None:
    cache = PagedKVCache.create(CONFIG)
    filled = cache.allocate_for_request(request_id=1, num_tokens=9)
    assert cache.get_num_free_blocks() == 13  # the old value is still good
    assert filled.get_num_free_blocks() == 10
    assert float(filled.usage()) == pytest.approx(3 / 13)
    assert (filled.get_block_table(1, layer_idx=1) >= 0).sum() == 3
    longer = filled.extend_allocation(request_id=1, additional_tokens=4)
    assert (longer.get_block_table(1) >= 0).sum() == 4
    empty = longer.free_request(1)
    assert empty.get_num_free_blocks() == 13
    for each in (cache, filled, longer, empty):
        each.check_invariants()


def test_free_rows_takes_a_mask() -> None:
    cache = PagedKVCache.create(CONFIG)
    cache, _ = cache.extend(jnp.array([9, 4, 1]), num_tokens=16)
    partly, ok = cache.free_rows(jnp.array([True, False, True]), capacity=3)  # three blocks, then one too many
    assert ok.tolist() == [True, True, False]
    assert partly.table.num_tokens.tolist() == [0, 4, 1]
    partly.check_invariants()
    freed, ok = cache.free_rows(jnp.array([True, False, True]))
    assert ok.all()
    assert freed.table.num_tokens.tolist() == [0, 4, 0]
    assert freed.get_num_free_blocks() == 12
    freed.check_invariants()


def write(cache: PagedKVCache, k_shape: tuple, v_shape: tuple, dtype: type = jnp.float32) -> PagedKVCache:
    return cache.write(0, jnp.ones(k_shape, dtype), jnp.ones(v_shape), jnp.arange(2))


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (UnknownRequestError, lambda c: c.allocate_for_request(3, 1), "want 0 to 2"),
        (UnknownRequestError, lambda c: c.allocate_for_request(-1, 1), "want 0 to 2"),
        (InvalidArgumentError, lambda c: c.extend_allocation("a", 1), "'a'"),
        (UnknownRequestError, lambda c: c.free_request(2), "holds nothing"),
        (UnknownRequestError, lambda c: c.get_block_table(7), "want 0 to 2"),
        (InvalidArgumentError, lambda c: c.allocate_for_request(0, 1), "holds blocks already"),
        (InvalidArgumentError, lambda c: c.allocate_for_request(2, -1), "got -1"),
        (InvalidArgumentError, lambda c: c.extend_allocation(0, 1.5), "1.5"),
        (InvalidArgumentError, lambda c: c.get_block_table(0, 2), "want 0 to 1"),
        (InvalidArgumentError, lambda c: c.extend(jnp.ones(4, jnp.int32)), r"want \(3,\)"),
        (RequestTooLongError, lambda c: c.extend_allocation(0, 4), "at most 24"),
        (OutOfBlocksError, lambda c: c.allocate_for_request(2, 17), "4 free blocks"),
        (ShapeMismatchError, lambda c: c.write(0, jnp.ones((2, 2, 9)), jnp.ones((2, 2, 8)), jnp.arange(2)), "9"),
        (ShapeMismatchError, lambda c: c.write(0, jnp.ones((2, 2, 8)), jnp.ones((3, 2, 8)), jnp.arange(2)), "v: got"),
        (
            ShapeMismatchError,
            lambda c: c.write(0, jnp.ones((2, 2, 8), int), jnp.ones((2, 2, 8)), jnp.arange(2)),
            "int32",
        ),
        (ShapeMismatchError, lambda c: c.pages.with_scales(jnp.ones(()), jnp.ones(())), "int8 or fp8"),
    ],
)
def test_bad_input_raises_and_changes_nothing(error: type[Exception], call: object, wanted: str) -> None:
    cache = PagedKVCache.create(CONFIG)
    cache, _ = cache.extend(jnp.array([21, 9, 0]), num_tokens=32)
    before = jax.tree.map(np.array, cache)
    with pytest.raises(error, match=wanted):
        call(cache)
    chex.assert_trees_all_equal(jax.tree.map(np.array, cache), before)


def test_blocks_are_copied_and_gathered_over_all_layers() -> None:
    rng = np.random.default_rng(5)
    cache = PagedKVCache.create(CONFIG)
    q, k, v = random_tokens(rng, 32)
    cache, _, _ = step(cache, jnp.array([9, 7, 8]), q, k, v, 32)
    before_k, before_v = (np.asarray(x) for x in cache.pages.gather_blocks(jnp.arange(13)))
    assert before_k.shape == (LAYERS, 13, KV_HEADS, 4, DIM)
    src, dst = [0, 12, -1, 3], [12, 0, 5, 11]  # a swap, a pair left out, and a plain copy
    copied = jax.jit(lambda pages: pages.copy_blocks(jnp.array(src), jnp.array(dst)))(cache.pages)
    want_k, want_v = before_k.copy(), before_v.copy()
    for wanted, before in ((want_k, before_k), (want_v, before_v)):
        wanted[:, [12, 0, 11]] = before[:, [0, 12, 3]]
    after_k, after_v = copied.gather_blocks(jnp.array([*range(13), -1]))
    np.testing.assert_array_equal(after_k[:, :13], want_k)
    np.testing.assert_array_equal(after_v[:, :13], want_v)
    np.testing.assert_array_equal(after_k[:, 13], 0)
    assert np.abs(want_k - before_k).max() > 0


@pytest.mark.parametrize("kernel_block_size", [None, 2])
def test_a_compressed_slot_mapping_is_taken_as_it_is(kernel_block_size: int | None) -> None:
    rng, lens = np.random.default_rng(5), jnp.array([7, 0, 9])
    config = dataclasses.replace(CONFIG, kernel_block_size=kernel_block_size)
    cache, meta = PagedKVCache.create(config).extend(lens, num_tokens=18)
    q, k, v = (x[0] for x in random_tokens(rng, 18))

    @jax.jit
    def attend(cache: PagedKVCache, meta: AttentionMetadata) -> tuple[jax.Array, PagedKVCache]:
        return cache.attend(jnp.int32(1), q, k, v, meta)

    mapping, _ = SlotMapping(meta.slot_mapping).compress(config.block_size, capacity=8)
    chex.assert_trees_all_equal(
        attend(cache, meta), attend(cache, dataclasses.replace(meta, slot_mapping=mapping).cut(ROWS, 18))
    )


def test_what_is_no_layer_no_mask_and_no_count_is_refused() -> None:
    cache, meta = PagedKVCache.create(CONFIG).extend(jnp.array([1, 0, 1]))
    q, k = jnp.ones((ROWS, Q_HEADS, DIM)), jnp.ones((ROWS, KV_HEADS, DIM))
    for layer in (LAYERS, -1, np.int64(7)):
        with pytest.raises(InvalidArgumentError, match=f"layer: got {layer}, want 0 to {LAYERS - 1}"):
            cache.attend(layer, q, k, k, meta)
        with pytest.raises(InvalidArgumentError, match="want 0 to"):
            jax.jit(lambda cache, layer=layer: cache.write(layer, k, k, meta.slot_mapping))(cache)
    for rows in (jnp.array([1]), jnp.arange(ROWS), [True] * (ROWS - 1)):
        with pytest.raises(ShapeMismatchError, match=f"want a mask, bool\\[{ROWS}\\]"):
            cache.free_rows(rows)
    with pytest.raises(ShapeMismatchError, match="want int32"):
        cache.extend(jnp.array([1.9, 0.5, 1.0]))
    assert cache.free_rows([True, False, True])[0].table.num_tokens.tolist() == [0, 0, 0]


def test_a_row_is_refused_past_max_model_len_though_its_last_block_has_room() -> None:
    config = dataclasses.replace(CONFIG, max_model_len=6)
    cache, meta = jax.jit(lambda cache, lens: cache.extend(lens, num_tokens=16))(
        PagedKVCache.create(config), jnp.array([6, 7, 3])
    )
    assert meta.ok.tolist() == [True, False, True]
    cache, meta = jax.jit(PagedKVCache.extend)(cache, jnp.array([1, 1, 1]))
    assert meta.ok.tolist() == [False, True, True]
    assert cache.table.num_tokens.tolist() == [6, 1, 4]
