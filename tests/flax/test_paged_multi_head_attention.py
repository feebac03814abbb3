"""``PagedMultiHeadAttention`` is ``nnx.MultiHeadAttention`` with another cache."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyagent_kv_jax import (
    ConfigError,
    InvalidArgumentError,
    KVCacheConfig,
    OutOfBlocksError,
    PagedKVCache,
    RequestTooLongError,
    ShapeMismatchError,
)
from pyagent_kv_jax.flax import PagedMultiHeadAttention
from pyagent_kv_jax.flax.shared_kv_cache import SharedKVCache
from pyagent_kv_jax.models.rope import RopeConfig, rotary_table, rotate
from tests.flax import numpy_attention

ROWS, LONGEST, FEATURES = 4, 96, 24
_HAS_POSITIONS = "input_positions" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters  # later flax's
SIZES: dict[str, Any] = {
    "plain": {"num_heads": 6},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "qkv_features": 48, "out_features": 10, "normalize_qk": True},
}


def pair(case: str, **options: Any) -> tuple[nnx.MultiHeadAttention, PagedMultiHeadAttention]:
    """Theirs, and ours with the parameters of theirs."""
    sizes = {"in_features": FEATURES, "decode": options.pop("decode", True), **SIZES[case]}
    theirs = nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0))
    ours = PagedMultiHeadAttention(**sizes, **options, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    ours.init_cache((ROWS, LONGEST, FEATURES))
    return theirs, ours


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    table = rotary_table(positions.reshape(-1), RopeConfig(10_000.0), x.shape[-1])
    return rotate(x.reshape(-1, *x.shape[2:]), table).reshape(x.shape)


@nnx.jit
def call(module: nnx.Module, x: jax.Array, lengths: jax.Array) -> jax.Array:
    return module(x, lengths=lengths)


@nnx.jit
def decode(module: nnx.Module, x: jax.Array) -> jax.Array:
    return module(x)


def params_of(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("case", SIZES)
def test_prompts_and_64_decode_steps_of_rows_of_different_lengths(case: str) -> None:
    """Against theirs, one token at a time, and against numpy; lengths 0 (the row begins later), 1, and past a block."""
    theirs, ours = pair(case)
    lengths = np.array([17, 0, 1, 30])
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(ROWS, LONGEST, FEATURES)), jnp.float32)
    steps = [(lengths, call(ours, tokens[:, :30], jnp.asarray(lengths, jnp.int32)))]
    for _ in range(64):
        at = steps[-1][0]
        steps.append((at + 1, decode(ours, tokens[jnp.arange(ROWS), at][:, None])))

    theirs.init_cache((ROWS, LONGEST, FEATURES))
    want = np.stack([np.asarray(decode(theirs, tokens[:, i : i + 1])[:, 0]) for i in range(LONGEST)], axis=1)
    for row in range(ROWS):
        got = np.stack([*steps[0][1][row, : lengths[row]], *(np.asarray(out[row, 0]) for _, out in steps[1:])])
        np.testing.assert_allclose(got, want[row, : len(got)], atol=1e-5, rtol=1e-5)
        exact = numpy_attention.attend(params_of(theirs), tokens[row, : len(got)])
        np.testing.assert_allclose(got, exact, atol=1e-5, rtol=1e-5)
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == (lengths + 64).tolist()
    ours.paged_cache.get_value().check_invariants()


def test_checkpoints_load_both_ways_and_nothing_changes_without_decode() -> None:
    theirs, ours = pair("grouped")
    x = jax.random.normal(jax.random.key(0), (2, 5, FEATURES))
    mask = nnx.make_causal_mask(jnp.ones((2, 5)))
    np.testing.assert_array_equal(ours(x, mask=mask, decode=False), theirs(x, mask=mask, decode=False))
    other = nnx.MultiHeadAttention(in_features=FEATURES, **SIZES["grouped"], rngs=nnx.Rngs(2))
    nnx.update(other, nnx.state(ours, nnx.Param))
    np.testing.assert_array_equal(other(x, decode=False), ours(x, decode=False))


def test_rope_window_and_chunks() -> None:
    """A prompt in two chunks and one step, against the same without a cache, masked by hand."""
    _, ours = pair("grouped", rope=rope, sliding_window=6, cache_options={"block_size": 4})
    x = jax.random.normal(jax.random.key(1), (ROWS, 21, FEATURES))
    parts = []
    for start, end in ((0, 12), (12, 20), (20, 21)):
        chunk = jnp.pad(x[:, start:end], ((0, 0), (0, 12 - end + start), (0, 0)), constant_values=jnp.nan)
        parts.append(call(ours, chunk, jnp.full(ROWS, end - start, jnp.int32))[:, : end - start])
    at = jnp.arange(21)
    seen = (at[:, None] >= at) & (at[:, None] - at < 6)
    want = ours(x, mask=seen[None, None], decode=False)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-5, rtol=1e-5)


def test_pages_are_written_in_place_under_donation() -> None:
    _, ours = pair("plain", cache_options={"num_blocks": 4096})
    graph, params, cache = nnx.split(ours, nnx.Param, ...)

    def step(params: Any, cache: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, params, cache)
        out = module(x)
        return out, nnx.split(module, nnx.Param, ...)[2]

    x = jnp.ones((ROWS, 1, FEATURES))
    memory = jax.jit(step, donate_argnums=1).lower(params, cache, x).compile().memory_analysis()
    pages = ours.paged_cache.get_value().pages.nbytes
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes < pages / 20


def test_a_row_without_blocks_gives_nan_and_the_others_go_on() -> None:
    _, ours = pair("plain", cache_options={"num_blocks": 5})
    x = jax.random.normal(jax.random.key(0), (ROWS, 16, FEATURES))
    with pytest.raises(OutOfBlocksError, match="row 2: got 17 tokens after 0, want what fits into 5 free blocks"):
        ours(jnp.concatenate([x, x[:, :1]], axis=1), lengths=[17] * ROWS)
    assert ours.paged_cache.get_value().get_num_free_blocks() == 5
    out = call(ours, x, jnp.array([16, 16, 16, 16], jnp.int32))
    assert not jnp.isnan(out).any()
    out = decode(ours, x[:, :1])
    assert jnp.isnan(out).any(axis=(1, 2)).tolist() == [False, True, True, True]
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == [17, 16, 16, 16]


def test_a_row_past_its_length_gives_nan_under_jit() -> None:
    """For 90 tokens, where the blocks would have room for 96."""
    _, ours = pair("plain")
    ours.init_cache((ROWS, 90, FEATURES))
    x = jax.random.normal(jax.random.key(0), (ROWS, 30, FEATURES))
    for lengths in ([30, 30, 30, 1], [30, 30, 29, 1], [29, 30, 30, 1]):
        out = call(ours, x, jnp.array(lengths, jnp.int32))
        assert not jnp.isnan(out).any()
    assert jnp.isnan(call(ours, x, jnp.array([2, 1, 2, 31], jnp.int32))).all(axis=(1, 2)).tolist() == [True] * 4
    assert jnp.isnan(call(ours, x, jnp.array([1, 0, 1, -1], jnp.int32))).all(axis=(1, 2)).tolist() == [0, 0, 0, 1]
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == [90, 90, 90, 3]


def test_one_trace_serves_ragged_decode_and_the_state_keeps_its_shapes() -> None:
    """A functional step; the state also goes to a dict and back half way, into a module made anew."""
    _, ours = pair("plain")
    tokens = jax.random.normal(jax.random.key(3), (ROWS, 8, FEATURES))
    graph, params, first = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params: Any, state: Any, x: jax.Array, lengths: jax.Array) -> Any:
        module = nnx.merge(graph, params, state)
        out = module(x, lengths=lengths)
        return out, nnx.state(module, nnx.Not(nnx.Param))

    state, held = first, np.zeros(ROWS, np.int32)
    got: list[list[np.ndarray]] = [[] for _ in range(ROWS)]
    for lengths in np.array([[3, 0, 2, 1], [0, 1, 3, 3], [2, 2, 0, 0], [1, 1, 1, 1]], np.int32):
        at = np.minimum(held[:, None] + np.arange(3), 7)
        out, state = step(params, state, tokens[np.arange(ROWS)[:, None], at], lengths)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
        for row in range(ROWS):
            got[row].extend(np.asarray(out[row, : lengths[row]]))
        held += lengths
        saved = nnx.to_pure_dict(state)
        _, fresh = pair("plain")
        state = nnx.state(fresh, nnx.Not(nnx.Param))
        nnx.replace_by_pure_dict(state, saved)
    for row in range(ROWS):
        want = numpy_attention.attend(params_of(ours), tokens[row, : held[row]])
        np.testing.assert_allclose(np.stack(got[row]), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "stored", "error"), [("int8", jnp.int8, 0.03), (jnp.float8_e4m3fn, jnp.uint8, 0.1)])
def test_quantised_pages(dtype: Any, stored: Any, error: float) -> None:
    """Near, and not nearer than their scales allow, so it is they that are read; under ``nnx.remat``."""
    options = {"dtype": dtype, "k_scale": jnp.array([0.03, 0.025]), "v_scale": np.array([0.02, 0.03])}  # of KV heads
    _, ours = pair("grouped", sliding_window=3, cache_options=options)
    assert ours.paged_cache.get_value().pages.k_pages.dtype == stored
    hash(ours.cache_options)  # a module's options are static
    x = jax.random.normal(jax.random.key(4), (ROWS, 5, FEATURES))
    again = nnx.jit(nnx.remat(lambda module, x: module(x)))
    got = jnp.concatenate([again(ours, x[:, i : i + 1]) for i in range(5)], axis=1)
    want = np.stack([numpy_attention.attend(params_of(ours), row, window=3) for row in x])
    assert 1e-4 < abs(got - want).max() < error


def test_rows_may_be_spread_over_several_axes() -> None:
    _, ours = pair("plain")
    x = jax.random.normal(jax.random.key(5), (ROWS, 1, FEATURES))
    want = decode(ours, x)
    _, other = pair("plain")
    other.init_cache((2, 2, LONGEST, FEATURES))
    np.testing.assert_array_equal(decode(other, x.reshape(2, 2, 1, FEATURES)), want.reshape(2, 2, 1, FEATURES))
    other(x.reshape(2, 2, 1, FEATURES), lengths=[[1, 0], [0, 1]])
    assert other.paged_cache.get_value().table.num_tokens.tolist() == [2, 1, 1, 2]


def test_layers_that_share_one_cache() -> None:
    """Two layers over one table and pool, with RoPE: as with a cache each; prompts, then decode."""
    layers = [pair("grouped", rope=rope, sliding_window=window)[1] for window in (None, 2)]
    nnx.update(layers[1], jax.tree.map(lambda x: x * 1.5, nnx.state(layers[1], nnx.Param)))
    for layer in layers:
        layer.out = nnx.LinearGeneral((6, 8), FEATURES, axis=(-2, -1), rngs=nnx.Rngs(7))
    config = KVCacheConfig(2, 2, 8, num_blocks=24, max_num_reqs=ROWS, max_model_len=LONGEST)
    shared = SharedKVCache(PagedKVCache.create(config))
    x = jax.random.normal(jax.random.key(6), (ROWS, 1, FEATURES))
    lengths = jnp.array([1, 0, 1, 1], jnp.int32)
    step = nnx.jit(lambda layers, x: layers[1](layers[0](x), lengths=lengths))

    @nnx.jit
    def shared_step(layers: list[PagedMultiHeadAttention], cache: Any, x: jax.Array) -> Any:
        shared = SharedKVCache(cache)
        shared.extend(lengths)
        for i, layer in enumerate(layers):
            x = layer(x, cache=shared.layer(i))
        return x, shared.cache

    cache, served = shared.cache, np.array([0, 2, 3])
    for _ in range(3):
        want = step(layers, x)
        got, cache = shared_step(layers, cache, x)
        np.testing.assert_allclose(got[served], want[served], atol=1e-5, rtol=1e-5)
        x = got
    assert cache.table.num_tokens.tolist() == [3, 0, 3, 3]
    for options, message in (
        ({"cache": shared}, "got a cache of type SharedKVCache, want shared.layer"),
        ({"cache": shared.layer(0), "lengths": [1] * 4}, "with a shared cache"),
        ({"cache": shared.layer(0), "decode": False}, "with a shared cache"),
        ({"cache": shared.layer(0)}, "outside a step"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            layers[0](x, **options)
    shared.extend(lengths)
    for inputs, layer, error, message in [
        ((x,), 2, InvalidArgumentError, "got layer 2, want 0 to 1"),
        ((x, x[:1]), 1, ShapeMismatchError, r"layer 1: .*\[1, 1, 2, 8\].* 4 tokens in all"),
        ((x[:3],), 1, ShapeMismatchError, r"layer 1: .*\[3, 1, 6, 8\].* 4 tokens in all"),
    ]:
        with pytest.raises(error, match=f"^PagedMultiHeadAttention.*{message}.*a cache of 2 layers, 4 rows of 96"):
            layers[0](*inputs, cache=shared.layer(layer))
    assert not jnp.abs(shared.cache.pages.k_pages).any()


class Turning(nnx.Module):
    """A rope with a parameter, which is particular about the shapes that it is promised."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        chex.assert_shape(positions, x.shape[:2])
        return rope(x, positions) * self.scale


def test_a_rope_sees_one_batch_axis_and_is_trained_and_restored_with_its_module() -> None:
    _, ours = pair("grouped", rope=Turning(), decode=False)
    _, other = pair("grouped", rope=Turning(), decode=False)
    assert nnx.graphdef(ours) == nnx.graphdef(other)  # jit compiles once for both
    x = jax.random.normal(jax.random.key(8), (ROWS, 3, FEATURES))
    mask = nnx.make_causal_mask(x[..., 0])
    trained = nnx.jit(nnx.value_and_grad(lambda module: (module(x, mask=mask) ** 2).sum()))
    loss, grads = trained(ours)
    assert abs(grads["rope"]["scale"][...]) > 1e-2
    ours.rope.scale.set_value(jnp.float32(0.5))
    assert abs(trained(ours)[0] - loss) > 1e-2

    @nnx.jit
    def calls(module: PagedMultiHeadAttention) -> list[jax.Array]:
        """Without a cache as one axis of rows and as two, then over shared caches, tokens on any axes."""
        outs = [module(x, mask=mask), module(x.reshape(2, 2, 3, -1), mask=mask.reshape(2, 2, 1, 3, 3))]
        for lead in ((12,), (2, 3, 2)):
            shared = SharedKVCache(PagedKVCache.create(config))
            shared.extend(jnp.full(ROWS, 3), num_tokens=12)
            outs.append(module(x.reshape(*lead, FEATURES), cache=shared.layer(0)))
        return [out.reshape(outs[0].shape) for out in outs]

    config = KVCacheConfig(1, 2, 8, num_blocks=24, max_num_reqs=ROWS, max_model_len=LONGEST)
    want, *others = calls(ours)
    for got in others:
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_blocks_as_many_as_a_share_of_memory_holds() -> None:
    options = [{"memory_fraction": 1e-9}, {"memory_fraction": 1e-9, "num_blocks": 5}, {}]
    caches = [pair("plain", cache_options=each)[1].paged_cache.get_value() for each in options]
    assert [cache.config.num_blocks for cache in caches] == [1, 5, 24]


def test_caches_of_another_geometry_are_refused() -> None:
    _, ours = pair("plain")
    x = jnp.ones((ROWS, 1, FEATURES))
    own = ours.paged_cache.get_value()
    other = pair("grouped")[1].paged_cache.get_value()
    _, small = pair("plain", cache_options={"num_blocks": 5})
    small.init_cache((ROWS, 80, FEATURES))
    small = small.paged_cache.get_value()
    for cache, error, message in [
        (
            other,
            ShapeMismatchError,
            r"4 rows x 96 tokens x 2 kv heads x head_dim 8, in blocks of 16, .* want one layer",
        ),
        (
            dataclasses.replace(own, pages=other.pages),
            ShapeMismatchError,
            r"pages \[24, 2, 16, 8\], .* want one layer of 6",
        ),
        (dataclasses.replace(own, pool=small.pool), ShapeMismatchError, r"pool \[5\], want one layer"),
        (dataclasses.replace(own, table=small.table), ShapeMismatchError, r"table \[4, 5\], pool \[24\], want"),
        ({"pages": 1}, InvalidArgumentError, "got a cache of type dict, want a PagedKVCache"),
        (jax.tree.map(jnp.zeros_like, own), InvalidArgumentError, "whose pool is all zeros"),
    ]:
        ours.paged_cache.set_value(cache)
        with pytest.raises(error, match=f"(?s)^PagedMultiHeadAttention: .*{message}.*init_cache"):
            ours(x)
    for options, error, message in [
        ({"blocksize": 4}, ConfigError, "got blocksize, want some of block_size"),
        ({"dtype": "float64"}, ConfigError, "got 'float64'"),
        ({"k_scale": 0.5}, ShapeMismatchError, "want int8 or fp8"),
    ]:
        with pytest.raises(error, match=message):
            pair("plain", cache_options=options)


def test_what_decode_cannot_do_is_refused() -> None:
    _, ours = pair("plain")
    x = jnp.ones((ROWS, 2, FEATURES))
    fresh = PagedMultiHeadAttention(6, FEATURES, decode=True, dropout_rate=0.1, rngs=nnx.Rngs(0))
    for module, arguments, options, error, message in [
        (
            fresh,
            (x,),
            {"deterministic": True},
            InvalidArgumentError,
            "PagedMultiHeadAttention: got decode=True without",
        ),
        (fresh, (x,), {"deterministic": False}, InvalidArgumentError, "got dropout in decode"),
        (ours, (x,), {"mask": jnp.ones((1, 1, 2, 2), bool)}, InvalidArgumentError, "got mask in decode"),
        (
            ours,
            (x,),
            {"input_positions": x},
            InvalidArgumentError if _HAS_POSITIONS else TypeError,
            "got input_positions",
        ),
        (ours, (x,), {"maks": None}, TypeError, "got maks, want options of nnx.MultiHeadAttention"),
        (ours, (x, None, x), {}, InvalidArgumentError, "got inputs_v without inputs_k"),
        (ours, (x[..., :7],), {}, ShapeMismatchError, r"want last axes of \(24, 24, 24\)"),
        (ours, (x, x[:, :1]), {}, ShapeMismatchError, r"shapes \[\[4, 2, 24\], \[4, 1, 24\], \[4, 1, 24\]\]"),
        (ours, (x,), {"sow_weights": True}, InvalidArgumentError, "got sow_weights in decode"),
        (ours, (x[:2],), {}, ShapeMismatchError, r"want \[4, n, features\] each, for its cache of 4 rows x 96 tokens"),
        (ours, (x,), {"lengths": [3, 0, 0, 0]}, InvalidArgumentError, r"lengths: got \[3, 0, 0, 0\], want 0 to 2"),
        (ours, (x,), {"lengths": [1, 1]}, ShapeMismatchError, "lengths"),
        (ours, (x,), {"lengths": [1, 1, 1, 1], "decode": False}, InvalidArgumentError, "without decode"),
        (
            ours,
            (jnp.ones((ROWS, 97, FEATURES)),),
            {},
            RequestTooLongError,
            "row 0 would hold 97 tokens, want at most 96",
        ),
    ]:
        with pytest.raises(error, match=message):
            module(*arguments, **options)
    for shape in ((ROWS, FEATURES), (ROWS, LONGEST, 6, 4)):
        with pytest.raises(ShapeMismatchError, match=r"input_shape: .* want \(rows, tokens, 24\)"):
            ours.init_cache(shape)
    ours.attention_fn = lambda q, k, v, **_: q
    with pytest.raises(InvalidArgumentError, match="got attention_fn in decode"):
        ours(x)
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == [0] * ROWS
