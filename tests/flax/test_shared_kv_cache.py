"""``SharedKVCache``: one cache, by reference in every layer, through each transformation of NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from pyagent_kv_jax import (
    CacheSharding,
    InvalidArgumentError,
    KVCacheConfig,
    OutOfBlocksError,
    PagedKVCache,
    RequestTooLongError,
    ShapeMismatchError,
    sharded_cache,
)
from pyagent_kv_jax.flax import SharedKVCache

LAYERS, HEADS, KV_HEADS, DIM, FEATURES, ROWS, TOKENS = 2, 4, 2, 8, 16, 3, 20
WINDOWS = (None, 5)
LENS = np.array([7, 0, 12])  # a prompt longer than a window and a block, and a row that begins later
CONFIG = KVCacheConfig(
    num_layers=LAYERS,
    num_heads=KV_HEADS,
    head_dim=DIM,
    num_blocks=2048,
    block_size=4,
    max_num_reqs=ROWS,
    max_model_len=32,
    dtype="float32",
)


class Block(nnx.Module):
    """A layer that knows nothing of tables; ``attend(q, k, v, **options)`` is handed to it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(FEATURES, (HEADS + 2 * KV_HEADS) * DIM, rngs=rngs)
        self.out = nnx.Linear(HEADS * DIM, FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array, attend: Callable[..., jax.Array], window: Any = None) -> jax.Array:
        heads = self.qkv(x).reshape(*x.shape[:-1], -1, DIM)
        q, k, v = jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=-2)
        return x + self.out(attend(q, k, v, sliding_window=window).reshape(*x.shape[:-1], -1))


class Model(nnx.Module):
    """Layers in a list; ``how`` says by which way they come to the cache."""

    def __init__(self, how: str, shared: SharedKVCache | None = None) -> None:
        self.how = how
        self.blocks = nnx.List([Block(nnx.Rngs(layer)) for layer in range(LAYERS)])
        self.shared = nnx.data(shared)

    def __call__(self, x: jax.Array, shared: SharedKVCache) -> jax.Array:
        handles = shared.layers(f"layer_{layer}" for layer in range(LAYERS))
        for layer, block in enumerate(self.blocks):
            handle, window = handles[f"layer_{layer}"], WINDOWS[layer]
            if self.how == "handles":
                x = block(x, lambda *qkv, handle=handle, **options: handle.attend(*qkv, **options)[0], window)
            else:

                def run(block: Block, handle: Any, x: jax.Array, window: int | None = window) -> tuple[jax.Array, Any]:
                    return block(x, lambda *qkv, **options: handle.attend(*qkv, **options)[0], window), handle

                x, back = nnx.remat(run)(block, handle, x)
                assert back.shared is shared
        return x


def stacked_blocks() -> Block:
    """The blocks of ``Model`` as one, parameters [LAYERS, ...]."""
    states = [nnx.split(Block(nnx.Rngs(layer))) for layer in range(LAYERS)]
    return nnx.merge(states[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in states)))


def windows() -> jax.Array:
    return jnp.array([window or 1000 for window in WINDOWS], jnp.int32)


def nnx_scan(blocks: Block, x: jax.Array, shared: SharedKVCache) -> jax.Array:
    """By ``nnx.scan``, the cache in the carry, by reference."""

    @nnx.scan(in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry)
    def run(carry: Any, block: Block, layer: jax.Array, window: jax.Array) -> Any:
        x, shared = carry
        return block(x, partial(shared.attend, layer), window), shared

    x, _ = run((x, shared), blocks, jnp.arange(LAYERS), windows())
    return x


def nnx_scan_with_state_axes(blocks: Block, x: jax.Array, shared: SharedKVCache) -> jax.Array:
    """By ``nnx.scan``, the cache an argument whose state is carried."""
    carried = nnx.StateAxes({SharedKVCache: nnx.Carry})

    @nnx.scan(in_axes=(nnx.Carry, 0, carried, 0, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, block: Block, shared: SharedKVCache, layer: jax.Array, window: jax.Array) -> jax.Array:
        return block(x, partial(shared.attend, layer), window)

    return run(x, blocks, shared, jnp.arange(LAYERS), windows())


def lax_scan(blocks: Block, x: jax.Array, shared: SharedKVCache) -> jax.Array:
    """Without the class: the plain cache is the carry."""
    graph, stacked = nnx.split(blocks)
    meta = shared.meta

    def run(carry: Any, inputs: Any) -> Any:
        x, cache = carry
        params, layer, window = inputs

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
            nonlocal cache
            flat = (each.reshape(-1, *each.shape[-2:]) for each in (q, k, v))
            out, cache = cache.attend(layer, *flat, meta, **options)
            return out.reshape(q.shape)

        return (nnx.merge(graph, params)(x, attend, window), cache), None

    (x, cache), _ = jax.lax.scan(run, (x, shared.cache), (stacked, jnp.arange(LAYERS), windows()))
    shared.set_value(SharedKVCache(cache, meta).get_value())
    return x


FORMS: dict[str, tuple[Any, Any]] = {
    "handles": (lambda: Model("handles"), lambda model, x, shared: model(x, shared)),
    "nnx.remat": (lambda: Model("remat"), lambda model, x, shared: model(x, shared)),
    "nnx.scan": (stacked_blocks, nnx_scan),
    "nnx.scan, StateAxes": (stacked_blocks, nnx_scan_with_state_axes),
    "lax.scan": (stacked_blocks, lax_scan),
}


def dense(x: np.ndarray, weights: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """One whole sequence [n, FEATURES] through layers of (qkv, bias, out, bias), in float64, masked by hand."""
    x, n = x.astype(np.float64), len(x)
    for (w, b, w_out, b_out), window in zip(weights, WINDOWS, strict=True):
        heads = (x @ w + b).reshape(n, -1, DIM)
        q, k, v = np.split(heads, (HEADS, HEADS + KV_HEADS), axis=1)
        k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(DIM)
        behind = np.arange(n)[:, None] - np.arange(n)
        scores = np.where((behind >= 0) & (behind < (window or n)), scores, -np.inf)
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", probabilities, v).reshape(n, -1) @ w_out + b_out
    return x


def weights_of(block: Block) -> tuple[np.ndarray, ...]:
    values = (block.qkv.kernel, block.qkv.bias, block.out.kernel, block.out.bias)
    return tuple(np.asarray(value[...], np.float64) for value in values)


def sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs of each row: the prompt, and three tokens more, and what is wanted of them."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(n + 3, FEATURES)).astype(np.float32) for n in LENS]
    weights = [weights_of(Block(nnx.Rngs(layer))) for layer in range(LAYERS)]
    return inputs, [dense(x, weights) for x in inputs]


def poisoned() -> PagedKVCache:
    """An empty cache whose pages hold NaN, so that what was not written is not read unseen."""
    cache = PagedKVCache.create(CONFIG)
    return jax.tree.map(lambda leaf: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, cache)


def steps() -> Iterator[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]]:
    """A step with the prompts, then three with the next token of each row, all [1, TOKENS].

    Gives tokens, lens, and (row, position) of each token that is not padding.
    """
    inputs, _ = sequences()
    for start in range(4):
        lens = LENS if start == 0 else np.ones_like(LENS)
        held = np.zeros_like(LENS) if start == 0 else LENS + start - 1
        at = [(row, held[row] + i) for row in range(ROWS) for i in range(lens[row])]
        tokens = np.full((1, TOKENS, FEATURES), 7.0, np.float32)
        tokens[0, : len(at)] = [inputs[row][position] for row, position in at]
        yield tokens, lens, at


@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_decode_as_dense_and_in_place(form: str) -> None:
    """The cache made anew around each step, under ``jax.jit``, donated."""
    create, run = FORMS[form]
    graph, params = nnx.split(create())

    def step(params: Any, cache: PagedKVCache, x: jax.Array, lens: jax.Array) -> Any:
        shared = SharedKVCache(cache)
        meta = shared.extend(lens, num_tokens=TOKENS)
        out = run(nnx.merge(graph, params), x, shared)
        return out, meta.ok, shared.end_step()

    cache, (_, wanted) = poisoned(), sequences()
    arguments = (params, cache, jnp.ones((1, TOKENS, FEATURES)), jnp.ones(ROWS, int))
    compiled = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes / 20
    for tokens, lens, at in steps():
        out, ok, cache = compiled(params, cache, jnp.asarray(tokens), jnp.asarray(lens))
        assert ok.all()
        want = [wanted[row][position] for row, position in at]
        np.testing.assert_allclose(out[0, : len(at)], want, atol=1e-5, rtol=1e-5)
    assert cache.table.num_tokens.tolist() == (LENS + 3).tolist()
    cache.check_invariants()


def test_an_attribute_of_the_model_goes_through_split_and_merge_without_a_new_trace() -> None:
    """The cache is split off by its type; ``end_step`` keeps the shapes of a step what they were."""
    model = Model("handles", SharedKVCache(poisoned()))
    graph, params, cache = nnx.split(model, nnx.Param, SharedKVCache)

    @partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(1)
    def step(params: Any, cache: Any, x: jax.Array, lens: jax.Array) -> Any:
        model = nnx.merge(graph, params, cache)
        model.shared.extend(lens)
        out = model(x, model.shared)
        model.shared.end_step()
        return out, nnx.split(model, nnx.Param, SharedKVCache)[2]

    before = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), cache)
    inputs, wanted = sequences()
    for i in range(3):
        out, cache = step(params, cache, jnp.asarray(np.stack([x[i] for x in inputs])[:, None]), jnp.ones(ROWS, int))
        chex.assert_trees_all_equal_shapes_and_dtypes(before, cache)
        np.testing.assert_allclose(out[:, 0], np.stack([y[i] for y in wanted]), atol=1e-5, rtol=1e-5)


def test_nnx_jit_changes_the_cache_outside() -> None:
    """Donated, and in place; decode layout."""
    model, shared = Model("handles"), SharedKVCache(poisoned())
    run = nnx.jit(lambda model, x, shared: model(x, shared), donate_argnums=2)
    (inputs, wanted), before = sequences(), shared.cache.pages.k_pages
    for i in range(2):
        shared.extend(np.ones(ROWS, int))
        out = run(model, jnp.asarray(np.stack([x[i] for x in inputs])[:, None]), shared)
        np.testing.assert_allclose(out[:, 0], np.stack([y[i] for y in wanted]), atol=1e-5, rtol=1e-5)
    assert before.is_deleted()
    assert shared.meta is not None
    assert shared.meta.positions.tolist() == [1] * ROWS
    assert shared.cache.table.num_tokens.tolist() == [2] * ROWS


def test_pages_on_a_mesh() -> None:
    """KV heads over one axis, tokens over another: the same results."""
    mesh = jax.make_mesh((2, 2), ("tp", "dcp"), axis_types=(AxisType.Auto,) * 2)
    sharding = CacheSharding.of(mesh)
    shared = SharedKVCache(sharded_cache(CONFIG, sharding))
    graph, params = nnx.split(Model("handles"))
    inputs, wanted = sequences()

    @jax.jit
    def step(params: Any, cache: Any, x: jax.Array) -> Any:
        shared = SharedKVCache(cache)
        shared.extend(jnp.array([10, 0, 0]), num_tokens=10)
        return nnx.merge(graph, params)(x, shared), shared.end_step()

    out, _ = step(params, shared.cache, jnp.asarray(inputs[0])[None])
    np.testing.assert_allclose(out[0], wanted[0], atol=1e-5, rtol=1e-5)


def test_a_row_without_blocks_says_so_and_the_others_go_on() -> None:
    """Under ``jit``: ``meta.ok``, zeros from attention, nothing written, lengths as they were."""
    config = dataclasses.replace(CONFIG, num_blocks=3)
    qkv = jnp.asarray(np.random.default_rng(1).normal(size=(18, 2 * HEADS, DIM)), jnp.float32)

    @jax.jit
    def step(cache: PagedKVCache) -> Any:
        shared = SharedKVCache(cache)
        meta = shared.extend(jnp.array([5, 9, 4]), num_tokens=18)
        out = shared.attend(0, qkv[:, :HEADS], qkv[:, HEADS : HEADS + 2], qkv[:, HEADS + 2 : HEADS + 4])
        return meta.ok, out, shared.cache

    ok, out, cache = step(PagedKVCache.create(config))
    assert ok.tolist() == [True, False, False]
    assert np.abs(out[:5]).min() > 0
    assert not np.abs(out[5:]).any()
    assert cache.table.num_tokens.tolist() == [5, 0, 0]
    assert np.count_nonzero(np.abs(cache.pages.k_pages).sum((1, 3))) == 5
    assert np.count_nonzero(np.abs(cache.pages.v_pages).sum((1, 3))) == 5


def test_what_does_not_fit_is_refused_by_name() -> None:
    """Outside ``jit``, before anything changes; rows that are refused too."""
    shared = SharedKVCache(PagedKVCache.create(dataclasses.replace(CONFIG, num_blocks=2)))
    q, kv = jnp.ones((1, 5, HEADS, DIM)), jnp.ones((1, 5, KV_HEADS, DIM))
    sizes = "for a cache of 2 layers, 3 rows of 32 tokens, 2 heads of 8"
    with pytest.raises(InvalidArgumentError, match=rf"SharedKVCache: .* want extend\(lens\) before .*{sizes}"):
        shared.attend(0, q, kv, kv)
    for lens, num_tokens, error, message in [
        ([1, 1], None, InvalidArgumentError, r"lens of shape \[2\], want \[3\]"),
        ([1.7, 1, 1], None, ShapeMismatchError, r"lens: got float64\[3\], want int32\[3\]"),
        ([2**32 + 1, 1, 1], None, InvalidArgumentError, "lens: got 1 .. 4294967297, want integers that fit int32"),
        ([1, 2, 0], None, InvalidArgumentError, "row 1: got 2 tokens after 0, want 0 or 1 without num_tokens"),
        ([1, -1, 0], 5, InvalidArgumentError, "row 1: got -1 tokens"),
        ([3, 3, 0], 5, InvalidArgumentError, "row 1: got 3 tokens after 0, want at most num_tokens = 5"),
        ([33, 0, 0], 5, RequestTooLongError, "row 0: got 33 tokens after 0, want at most 32 in all"),
        ([1, 1, 1], 5, OutOfBlocksError, r"row 2: got 1 tokens after 0, want what fits into 2 free blocks"),
    ]:
        after = "" if message.startswith("lens: ") else rf".*{sizes}"
        with pytest.raises(error, match=rf"SharedKVCache.extend: .*{message}{after}"):
            shared.extend(np.array(lens), num_tokens)
    for options, message in [
        ({"num_tokens": -1}, "num_tokens: got -1"),
        ({"order": np.array([0, 0, 1])}, r"order: got \[0 0 1\], want each of 0 to 2 once"),
    ]:
        with pytest.raises(InvalidArgumentError, match=f"SharedKVCache.extend: {message}"):
            shared.extend(np.array([1, 0, 0]), **options)
    assert shared.meta is None
    short = SharedKVCache(PagedKVCache.create(dataclasses.replace(CONFIG, max_model_len=10)))
    with pytest.raises(RequestTooLongError, match="row 1: got 11 tokens after 0, want at most 10 in all"):
        short.extend(np.array([10, 11, 0]), num_tokens=21)  # for whose last token its last block has room
    with pytest.raises(InvalidArgumentError, match="SharedKVCache: got a cache that is NoneType, want a PagedKVCache"):
        SharedKVCache(None).attend(0, q, kv, kv)
    pages = SharedKVCache(shared.cache.pages)
    with pytest.raises(InvalidArgumentError, match="a cache that is KVPages, want a PagedKVCache"):
        pages.extend(np.array([1, 1, 1]))

    shared.extend(np.array([2, 0, 3]), num_tokens=5)
    for layer, arrays, error, message in [
        (2, (q, kv, kv), InvalidArgumentError, "got layer 2, want 0 to 1"),
        (1, (q[:, :4], kv[:, :4], kv[:, :4]), ShapeMismatchError, r"layer 1: .*\[1, 4, 4, 8\].* 5 tokens in all"),
        (1, (q[0], kv, kv), ShapeMismatchError, "layer 1"),
        (1, (q[:, :, :3], kv, kv), ShapeMismatchError, "a multiple of 2, 8"),
        (1, (q, kv[:, :, :1], kv), ShapeMismatchError, "layer 1"),
        (1, (q, kv, kv[..., :4]), ShapeMismatchError, "layer 1"),
    ]:
        with pytest.raises(error, match=rf"SharedKVCache.*{message}.*{sizes}"):
            shared.attend(layer, *arrays)
    assert not jnp.abs(shared.cache.pages.k_pages).any()
    shared.end_step()
    with pytest.raises(InvalidArgumentError, match="outside a step"):
        shared.attend(0, q, kv, kv)
