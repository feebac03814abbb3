"""Qwen3 of google-tunix: the same logits and tokens on pages as with its own cache."""

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
from qwen3_paged import PagedAttention, PagedQwen3, qwen3
from tunix.generate import utils

from pyagent_kv_jax import KVCacheConfig, PagedKVCache
from pyagent_kv_jax.flax import SharedKVCache
from pyagent_kv_jax.serving import SamplingParams, generate

CONFIG = qwen3.ModelConfig(
    num_layers=3,
    vocab_size=131,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-6,
)
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


def new_model(config: Any = CONFIG) -> qwen3.Qwen3:
    """With random weights, of norms too, that make logits differ by about one."""
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def weight(present: jax.Array) -> jax.Array:
        mean, spread = (1, 0.3) if present.ndim == 1 else (0, CONFIG.embed_dim**-0.5)
        return jnp.asarray(rng.normal(mean, spread, present.shape), present.dtype)

    nnx.update(model, jax.tree.map(weight, nnx.state(model, nnx.Param)))
    return model


@pytest.fixture(scope="module")
def model() -> qwen3.Qwen3:
    return new_model()


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    """Random tokens of each row: its prompt, and those of the decode steps."""
    rng = np.random.default_rng(1)
    return [rng.integers(1, CONFIG.vocab_size, n + STEPS) for n in LENGTHS]


@partial(nnx.jit, static_argnames="step")
def own_step(model: qwen3.Qwen3, tokens: jax.Array, start: jax.Array, cache: Any, *, step: str) -> Any:
    """One row, as ``tunix.generate.Sampler`` calls the model."""
    if step == "prefill":
        mask = utils.make_causal_attn_mask(jnp.ones(tokens.shape, bool), LONGEST)
    else:
        mask = utils.compute_attention_masks(start, LONGEST, jnp.zeros((1, LONGEST), bool))
    return model(tokens, start + jnp.arange(tokens.shape[1])[None], cache, mask)


def own_logits(model: qwen3.Qwen3, tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Logits with the model's own cache: those of the prompt, then of each later token."""
    cache = model.init_cache(1, LONGEST, jnp.float32)
    logits, cache = own_step(model, jnp.asarray(tokens[None, :length]), jnp.int32(0), cache, step="prefill")
    yield from np.asarray(logits[0])
    for at in range(length, len(tokens)):
        logits, cache = own_step(model, jnp.asarray(tokens[None, at : at + 1]), jnp.int32(at), cache, step="decode")
        yield np.asarray(logits[0, 0])


@pytest.fixture(scope="module")
def wanted(model: qwen3.Qwen3, rows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.stack(list(own_logits(model, row, n))) for row, n in zip(rows, LENGTHS, strict=True)]


def paged_step(model: qwen3.Qwen3) -> Any:
    graph, params = nnx.split(PagedQwen3(model))
    chex.clear_trace_counter()

    @partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(2)  # prompts, decode
    def step(params: Any, cache: PagedKVCache, tokens: jax.Array, lens: jax.Array) -> Any:
        cache, meta = cache.extend(lens, num_tokens=None if len(tokens) == len(lens) else len(tokens))
        logits, cache = nnx.merge(graph, params)(tokens, cache, meta)
        return logits, meta.ok, cache

    return partial(step, params), lambda *args: step.lower(params, *args)


def check_paged(model: qwen3.Qwen3, rows: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    step, _ = paged_step(model)
    cache = PagedKVCache.create(CACHE)
    prompts = np.concatenate([row[:n] for row, n in zip(rows, LENGTHS, strict=True)])
    logits, ok, cache = step(cache, jnp.asarray(prompts), jnp.asarray(LENGTHS))
    assert ok.all()
    want = np.concatenate([each[:n] for each, n in zip(wanted, LENGTHS, strict=True)])
    worst = np.abs(logits - want).max()
    for i in range(STEPS):
        tokens = np.array([row[n + i] for row, n in zip(rows, LENGTHS, strict=True)])
        logits, ok, cache = step(cache, jnp.asarray(tokens), jnp.ones(len(LENGTHS), int))
        assert ok.all()
        want = np.stack([each[n + i] for each, n in zip(wanted, LENGTHS, strict=True)])
        worst = max(worst, np.abs(logits - want).max())
    return float(worst)


def test_ragged_prompts_and_decode_have_the_logits_of_its_own_cache(
    model: qwen3.Qwen3, rows: list[np.ndarray], wanted: list[np.ndarray]
) -> None:
    worst = check_paged(model, rows, wanted)
    print(f"\nlargest difference of logits {worst:.1e}; they spread by {np.std(wanted[2]):.2f}")
    assert worst < 1e-4
    assert np.std(wanted[2]) > 0.5


@pytest.mark.parametrize("remat", [qwen3.RematConfig.BLOCK, qwen3.RematConfig.DECODER])
def test_with_its_remat(remat: Any, rows: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Handles go through ``nnx.remat`` like its own arrays."""
    assert check_paged(new_model(dataclasses.replace(CONFIG, remat_config=remat)), rows, wanted) < 1e-4


def test_decode_as_rows_of_one_token(model: qwen3.Qwen3, rows: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Tokens [R, 1], as its sampler has them."""
    tokens = jnp.asarray([[row[0]] for row in rows])
    shared = SharedKVCache(PagedKVCache.create(CACHE))
    meta = shared.extend(np.ones(len(rows), int))
    handles = shared.layers(f"layer_{i}" for i in range(CONFIG.num_layers))
    logits, back = model(tokens, meta.positions[:, None], handles, None)
    np.testing.assert_allclose(logits[:, 0], [each[0] for each in wanted], atol=1e-4)
    assert back["layer_2"].shared is shared


def test_its_own_way_is_as_it_was(model: qwen3.Qwen3, rows: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Models made with and without ours in place, in one process; training has no cache at all."""
    original = PagedAttention.__bases__[0]
    tokens, n = jnp.asarray(rows[2][None]), len(rows[2])
    try:
        qwen3.Attention = original
        theirs = new_model()
    finally:
        qwen3.Attention = PagedAttention
    assert type(theirs.layers[0].attn) is original
    assert type(model.layers[0].attn) is PagedAttention
    causal = jnp.tril(jnp.ones((1, n, n), bool))
    for cache, mask in ((None, causal), (model.init_cache(1, n, jnp.float32), causal)):
        want, _ = theirs(tokens, jnp.arange(n)[None], cache, mask)
        got, _ = model(tokens, jnp.arange(n)[None], cache, mask)
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(want[0], wanted[2], atol=1e-4)


def test_the_pages_are_written_in_place(model: qwen3.Qwen3) -> None:
    _, lower = paged_step(model)
    cache = PagedKVCache.create(CACHE)
    memory = lower(cache, jnp.ones(len(LENGTHS), int), jnp.ones(len(LENGTHS), int)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes / 10


def test_generate_gives_the_tokens_of_its_own_cache(model: qwen3.Qwen3, rows: list[np.ndarray]) -> None:
    prompts = [row[:n].tolist() for row, n in zip(rows, LENGTHS, strict=True)]
    results = generate(
        PagedQwen3(model),
        prompts,
        sampling=SamplingParams(max_tokens=16),
        cache_config=CACHE,
        max_num_seqs=3,
        token_budget=16,
    )
    for prompt, result in zip(prompts, results, strict=True):
        tokens = list(prompt)
        cache = model.init_cache(1, LONGEST, jnp.float32)
        new, at = np.array(tokens), 0
        for _ in range(16):
            kind = "prefill" if at == 0 else "decode"
            logits, cache = own_step(model, jnp.asarray(new[None]), jnp.int32(at), cache, step=kind)
            at, new = at + len(new), np.array([int(logits[0, -1].argmax())])
            tokens += new.tolist()
        assert result.token_ids == tokens[len(prompt) :]
    assert len({token for result in results for token in result.token_ids}) > 4
