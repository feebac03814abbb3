"""``PagedMultiHeadAttention`` is ``nnx.MultiHeadAttention`` with another cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyagent_kv_jax import InvalidArgumentError, RequestTooLongError, ShapeMismatchError
from pyagent_kv_jax.flax import PagedMultiHeadAttention
from pyagent_kv_jax.models.rope import RopeConfig, rotary_table, rotate

ROWS, LONGEST, FEATURES = 4, 96, 24
SIZES: dict[str, Any] = {
    "plain": {"num_heads": 6},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "qkv_features": 48, "out_features": 10, "normalize_qk": True},
}


def pair(case: str, **options: Any) -> tuple[nnx.MultiHeadAttention, PagedMultiHeadAttention]:
    """Theirs, and ours with the parameters of theirs."""
    sizes = {"in_features": FEATURES, "decode": True, **SIZES[case]}
    theirs = nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0))
    ours = PagedMultiHeadAttention(**sizes, **options, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    ours.init_cache((ROWS, LONGEST, FEATURES))
    return theirs, ours


@nnx.jit
def call(module: nnx.Module, x: jax.Array, lengths: jax.Array) -> jax.Array:
    return module(x, lengths=lengths)


@nnx.jit
def decode(module: nnx.Module, x: jax.Array) -> jax.Array:
    return module(x)


@pytest.mark.parametrize("case", SIZES)
def test_prompts_and_64_decode_steps_of_rows_of_different_lengths(case: str) -> None:
    """Against theirs, row by row, one token at a time; lengths 0 (the row begins later), 1, and past a block."""
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
        np.testing.assert_allclose(steps[0][1][row, : lengths[row]], want[row, : lengths[row]], atol=1e-5, rtol=1e-5)
        later = np.stack([np.asarray(out[row, 0]) for _, out in steps[1:]])
        np.testing.assert_allclose(later, want[row, lengths[row] : lengths[row] + 64], atol=1e-5, rtol=1e-5)
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

    def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
        table = rotary_table(positions.reshape(-1), RopeConfig(10_000.0), x.shape[-1])
        return rotate(x.reshape(-1, *x.shape[2:]), table).reshape(x.shape)

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
    out = call(ours, x, jnp.array([16, 16, 16, 16], jnp.int32))
    assert not jnp.isnan(out).any()
    out = decode(ours, x[:, :1])
    assert jnp.isnan(out).any(axis=(1, 2)).tolist() == [False, True, True, True]
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == [17, 16, 16, 16]


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
    with pytest.raises(ShapeMismatchError, match="input_shape"):
        ours.init_cache((ROWS, FEATURES))
    assert ours.paged_cache.get_value().table.num_tokens.tolist() == [0] * ROWS
