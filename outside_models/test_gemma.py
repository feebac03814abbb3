"""Gemma 3 of the ``gemma`` package: the same logits and tokens on pages as with its own cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gemma import gm
from gemma_paged import PagedAttention, PagedGemma, _modules

from pyagent_kv_jax import InvalidArgumentError, KVCacheConfig, PagedKVCache
from pyagent_kv_jax.serving import SamplingParams, generate

# The structure of Gemma 3 270M, five sliding layers and a global one, four query heads and one for K and V, made small.
CONFIG = dataclasses.replace(
    gm.nn.Gemma3_270M.config,
    num_embed=131,
    embed_dim=32,
    hidden_dim=48,
    head_dim=16,
    attention_types=gm.nn.Gemma3_270M.config.attention_types[:7],
    sliding_window_size=6,
)
MODEL = gm.nn.Gemma3_270M(config=CONFIG, dtype=jnp.float32)
LENGTHS, STEPS, LONGEST = np.array([11, 3, 29, 1]), 20, 64
CACHE = KVCacheConfig(
    num_layers=CONFIG.num_layers,
    num_heads=CONFIG.num_kv_heads,
    head_dim=CONFIG.head_dim,
    num_blocks=1024,
    block_size=4,
    max_num_reqs=len(LENGTHS),
    max_model_len=LONGEST,
    dtype="float32",
)


@pytest.fixture(scope="module")
def params() -> Any:
    """Random weights, of norms too, that make logits differ by about one."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def weight(shape: jax.ShapeDtypeStruct) -> jax.Array:
        spread = 0.3 if len(shape.shape) == 1 else CONFIG.embed_dim**-0.5
        return jnp.asarray(rng.normal(0, spread, shape.shape), jnp.float32)

    return jax.tree.map(weight, shapes)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    """Random tokens of each row: its prompt, and those of the decode steps."""
    rng = np.random.default_rng(1)
    return [rng.integers(1, CONFIG.num_embed, n + STEPS) for n in LENGTHS]


@jax.jit
def own_step(params: Any, tokens: jax.Array, start: jax.Array, cache: Any) -> Any:
    """One row, with the masks of ``gm.text.Sampler``: causal over what the cache holds."""
    positions = start + jnp.arange(tokens.shape[1])[None]
    mask = jnp.arange(LONGEST) <= positions[..., None]
    out = MODEL.apply({"params": params}, tokens, cache=cache, positions=positions, attention_mask=mask)
    return out.logits[0], out.cache


def own_logits(params: Any, tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Logits with the model's own cache: those of the prompt, then of each later token."""
    cache = MODEL.init_cache(batch_size=1, dtype=jnp.float32, cache_length=LONGEST)
    logits, cache = own_step(params, jnp.asarray(tokens[None, :length]), 0, cache)
    yield from np.asarray(logits)
    for at in range(length, len(tokens)):
        logits, cache = own_step(params, jnp.asarray(tokens[None, at : at + 1]), at, cache)
        yield np.asarray(logits[0])


@pytest.fixture(scope="module")
def wanted(params: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.stack(list(own_logits(params, row, n))) for row, n in zip(rows, LENGTHS, strict=True)]


def paged_step(params: Any) -> tuple[Any, Any]:
    graph, state = nnx.split(PagedGemma(MODEL, params))
    chex.clear_trace_counter()

    @partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(2)  # prompts, decode
    def step(state: Any, cache: PagedKVCache, tokens: jax.Array, lens: jax.Array) -> Any:
        cache, meta = cache.extend(lens, num_tokens=None if len(tokens) == len(lens) else len(tokens))
        logits, cache = nnx.merge(graph, state)(tokens, cache, meta)
        return logits, meta.ok, cache

    return step, state


def test_ragged_prompts_and_decode_have_the_logits_of_its_own_cache(
    params: Any, rows: list[np.ndarray], wanted: list[np.ndarray]
) -> None:
    step, state = paged_step(params)
    cache = PagedKVCache.create(CACHE)
    prompts = np.concatenate([row[:n] for row, n in zip(rows, LENGTHS, strict=True)])
    logits, ok, cache = step(state, cache, jnp.asarray(prompts), jnp.asarray(LENGTHS))
    assert ok.all()
    want = np.concatenate([each[:n] for each, n in zip(wanted, LENGTHS, strict=True)])
    worst = np.abs(logits - want).max()
    for i in range(STEPS):
        tokens = np.array([row[n + i] for row, n in zip(rows, LENGTHS, strict=True)])
        logits, ok, cache = step(state, cache, jnp.asarray(tokens), jnp.ones(len(LENGTHS), int))
        assert ok.all()
        want = np.stack([each[n + i] for each, n in zip(wanted, LENGTHS, strict=True)])
        worst = max(worst, np.abs(logits - want).max())
    print(f"\nlargest difference of logits {worst:.1e}; they spread by {np.std(wanted[2]):.2f}")
    assert worst < 1e-4
    assert np.std(wanted[2]) > 0.5


def test_its_own_way_is_as_it_was(params: Any, rows: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """With ours in place and without, before and after paged steps, in one process: each as ever, however jitted."""
    original = PagedAttention.__bases__[0]
    tokens = jnp.asarray(rows[0][None])
    paged = PagedGemma(MODEL, params)
    results, dense = {}, {}
    for order, attention in enumerate((PagedAttention, original, PagedAttention)):
        _modules.Attention = attention
        try:
            dense[order] = MODEL.apply({"params": params}, tokens).logits[0]
            if attention is PagedAttention:
                cache, meta = PagedKVCache.create(CACHE).extend(
                    jnp.array([tokens.size, 0, 0, 0]), num_tokens=tokens.size
                )
                results[order], _ = paged(tokens[0], cache, meta)
        finally:
            _modules.Attention = PagedAttention
    for got in (*results.values(), *dense.values()):
        np.testing.assert_allclose(got, wanted[0], atol=1e-4)
    np.testing.assert_array_equal(dense[0], dense[1])
    assert jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"].keys() == params.keys()


def test_the_pages_are_written_in_place(params: Any) -> None:
    step, state = paged_step(params)
    cache, ones = PagedKVCache.create(CACHE), jnp.ones(len(LENGTHS), int)
    memory = step.lower(state, cache, ones, ones).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes / 10


def test_a_cache_of_another_geometry_is_refused_by_name(params: Any) -> None:
    config = dataclasses.replace(CACHE, num_layers=5)
    cache, meta = PagedKVCache.create(config).extend(jnp.ones(len(LENGTHS), int))
    with pytest.raises(InvalidArgumentError, match=r"PagedAttention layer_5/attn: got layer 5, want 0 to 4"):
        PagedGemma(MODEL, params)(jnp.ones(len(LENGTHS), int), cache, meta)


def test_generate_gives_the_tokens_of_its_own_cache(params: Any, rows: list[np.ndarray]) -> None:
    prompts = [row[:n].tolist() for row, n in zip(rows, LENGTHS, strict=True)]
    results = generate(
        PagedGemma(MODEL, params),
        prompts,
        sampling=SamplingParams(max_tokens=16),
        cache_config=CACHE,
        max_num_seqs=3,
        token_budget=16,
    )
    for prompt, result in zip(prompts, results, strict=True):
        tokens = list(prompt)
        cache = MODEL.init_cache(batch_size=1, dtype=jnp.float32, cache_length=LONGEST)
        new, at = np.array(tokens), 0
        for _ in range(16):
            logits, cache = own_step(params, jnp.asarray(new[None]), at, cache)
            at, new = at + len(new), np.array([int(logits[-1].argmax())])
            tokens += new.tolist()
        assert result.token_ids == tokens[len(prompt) :]
    assert len({token for result in results for token in result.token_ids}) > 4
