"""What the model promises beside its numbers: shapes, dtypes, padding, one trace, pages written in place."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyagent_kv_jax.cache import PagedKVCache
from pyagent_kv_jax.config import DType
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM
from tests.models.prompt_attention import PromptAttention, prompt_metadata

CONFIG = LlamaConfig(50, 32, 48, 3, 4, 2, 8, max_position_embeddings=128)
TOKENS = np.random.default_rng(0).integers(0, 50, 12).astype(np.int32)
LENGTHS = [5, 7]


@jax.jit
def logits_of(model, tokens, logits_at=None):
    return model(tokens, PromptAttention(), prompt_metadata(LENGTHS, len(tokens)), logits_at=logits_at)[0]


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def test_parameters_are_stacked_by_layer(model):
    shapes = {jax.tree.leaves(leaf)[0].shape[0] for leaf in jax.tree.leaves(nnx.state(model.layers))}
    assert shapes == {CONFIG.num_layers}
    kernel = model.layers.mlp.up_proj.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])  # each layer has random values of its own


def test_logits_at(model):
    every = logits_of(model, TOKENS)
    chex.assert_shape(every, (12, 50))
    some = logits_of(model, TOKENS, logits_at=jnp.array([4, 11, -1, 0]))
    chex.assert_trees_all_close(some[jnp.array([0, 1, 3])], every[jnp.array([4, 11, 0])], atol=1e-5)
    chex.assert_trees_all_equal(some[2], jnp.zeros(50))


@pytest.mark.parametrize("wrong", [-1, 50, 2**31 - 1])
def test_a_token_outside_the_vocabulary_shows_in_its_own_sequence_only(model, wrong):
    tokens = TOKENS.copy()
    tokens[8] = wrong
    logits = np.asarray(logits_of(model, tokens))
    assert np.isnan(logits[8]).all()
    chex.assert_trees_all_close(logits[:8], np.asarray(logits_of(model, TOKENS))[:8], atol=1e-5)


def test_a_sequence_does_not_see_its_neighbour_or_the_future(model):
    changed = TOKENS.copy()
    changed[[0, 11]] = (changed[[0, 11]] + 1) % 50
    before, after = (np.asarray(logits_of(model, tokens)) for tokens in (TOKENS, changed))
    chex.assert_trees_all_close(after[5:11], before[5:11], atol=1e-5)
    assert np.abs(after[:5] - before[:5]).max(axis=-1).min() > 1e-4


def test_bfloat16(model):
    graph, params = nnx.split(model)
    half_graph, half_types = nnx.split(
        nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half_types)} == {jnp.dtype(jnp.bfloat16)}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    logits, exact = logits_of(nnx.merge(half_graph, half), TOKENS), logits_of(nnx.merge(graph, same), TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def decode_step(graph, params, cache, tokens, lens):
    cache, meta = cache.extend(lens)
    return nnx.merge(graph, params)(tokens, cache, meta)


def test_a_second_step_does_not_compile(model):
    graph, params = nnx.split(model)

    @partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(n=1)
    def step(*arguments):
        return decode_step(graph, *arguments)

    cache = PagedKVCache.create(CONFIG.kv_cache_config(num_blocks=12, block_size=4, max_num_reqs=3))
    for lens in ([1, 1, 1], [1, 0, 1], [0, 0, 1]):
        _, cache = step(params, cache, np.array([3, 1, 4], np.int32), np.array(lens, np.int32))


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_pages_are_written_in_place(model, dtype):
    """A decode step over a cache of 1 GiB, compiled but not run."""
    graph, params = nnx.split(model)
    sizes = {"block_size": 16, "max_num_reqs": 8, "dtype": dtype}
    bytes_of_one = CONFIG.kv_cache_config(num_blocks=1, **sizes).block_size_bytes()
    config = CONFIG.kv_cache_config(num_blocks=2**30 // bytes_of_one, **sizes)
    cache, row = jax.eval_shape(lambda: PagedKVCache.create(config)), jax.ShapeDtypeStruct((8,), jnp.int32)
    step = jax.jit(partial(decode_step, graph), donate_argnums=1)
    memory = step.lower(params, cache, row, row).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * 2**30
    assert memory.temp_size_in_bytes < 2**20
