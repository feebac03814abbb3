"""Our float32 logits beside those of ``transformers`` (scripts/make_golden_logits.py): at most 1e-4 apart."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyagent_kv_jax.cache import PagedKVCache
from pyagent_kv_jax.models import load_model
from tests.models.prompt_attention import PromptAttention, prompt_metadata

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 1e-4

# Rows: sequence 0, nobody, sequence 1. Uneven chunks, some of one token, prefill beside decode; then decode.
CHUNKS = [(7, 0, 0), (1, 0, 13), (22, 0, 1), (15, 0, 5)] + [(1, 0, 1)] * 32
ROWS = {0: 0, 2: 1}
PREFILL_TOKENS = 24


@pytest.fixture(autouse=True)
def _exact_products():
    """GPUs and TPUs would round the factors of float32 products to fewer bits."""
    with jax.default_matmul_precision("highest"):
        yield


def golden(name):
    """[(tokens i32[n], logits f32[n, vocab])] of both sequences."""
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return [(arrays[f"tokens_{i}"], arrays[f"logits_{i}"]) for i in range(2)]


def test_every_family_has_a_golden_model():
    configs = [load_model(GOLDEN / name, dtype=jnp.float32)[1] for name in NAMES]
    families = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"}
    assert {c.architecture for c in configs} == families
    assert {c.rope.kind for c in configs} == {"default", "linear", "llama3"}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert any(c.mlp_bias for c in configs)
    assert any(c.layer_windows for c in configs)
    gemma3 = [c for c in configs if c.local_rope]
    assert {c.local_rope != c.rope for c in gemma3} == {True}
    assert {(c.tie_word_embeddings, c.o_bias) for c in gemma3} == {(True, False), (False, True)}
    assert {c.attn_logit_soft_cap for c in gemma3} == {None, 3.0}
    assert {c.final_logit_soft_cap for c in gemma3} == {None, 4.0}
    assert any((GOLDEN / name / "model.safetensors.index.json").exists() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_whole_prompts(name):
    model, _ = load_model(GOLDEN / name, dtype=jnp.float32)
    sequences = golden(name)
    lengths = [tokens.size for tokens, _ in sequences]
    padded = np.full(sum(lengths) + 5, -1, np.int32)  # padding is no token: its embedding is NaN
    padded[: sum(lengths)] = np.concatenate([tokens for tokens, _ in sequences])
    logits, _ = jax.jit(model)(padded, PromptAttention(), prompt_metadata(lengths, padded.size))
    want = np.concatenate([logits for _, logits in sequences])
    assert np.abs(np.asarray(logits)[: sum(lengths)] - want).max() <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_paged_cache_in_chunks_and_decode_steps(name):
    model, config = load_model(GOLDEN / name, dtype=jnp.float32)
    graph, params = nnx.split(model)

    @partial(jax.jit, donate_argnums=1, static_argnames="num_tokens")
    def step(params, cache, tokens, lens, num_tokens=None):
        cache, meta = cache.extend(lens, num_tokens=num_tokens)
        logits, cache = nnx.merge(graph, params)(tokens, cache, meta)
        return logits, cache, meta.ok

    cache = poisoned(PagedKVCache.create(config.kv_cache_config(num_blocks=48, block_size=4, max_num_reqs=3)))
    sequences = golden(name)
    worst, done = 0.0, dict.fromkeys(ROWS, 0)
    for lens in CHUNKS:
        decode = max(lens) == 1
        size = len(lens) if decode else PREFILL_TOKENS
        places = place_tokens(lens, decode)
        tokens = np.full(size, -1, np.int32)
        for row, place in places.items():
            tokens[place] = sequences[ROWS[row]][0][done[row] : done[row] + lens[row]]
        num_tokens = None if decode else PREFILL_TOKENS
        logits, cache, ok = step(params, cache, tokens, np.array(lens, np.int32), num_tokens=num_tokens)
        assert np.all(ok)
        for row, place in places.items():
            want = sequences[ROWS[row]][1][done[row] : done[row] + lens[row]]
            worst = max(worst, np.abs(np.asarray(logits)[place] - want).max())
            done[row] += lens[row]
    assert done == {row: sequences[index][0].size for row, index in ROWS.items()}
    print(f"{name}: at most {worst:.1e} apart")
    assert worst <= TOLERANCE


def poisoned(cache):
    """Unwritten slots hold NaN, so that reading one shows."""
    fill = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), (cache.pages.k_pages, cache.pages.v_pages))
    pages = cache.pages.__class__(*fill, cache.pages.k_scale, cache.pages.v_scale, cache.pages.config)
    return cache.__class__(pages, cache.pool, cache.table, cache.config)


def place_tokens(lens, decode):
    """Where each row's tokens stand in the step: row r at r in decode layout, else one row after another."""
    starts = np.arange(len(lens)) if decode else np.concatenate([[0], np.cumsum(lens)])
    return {row: slice(starts[row], starts[row] + lens[row]) for row in ROWS if lens[row]}
