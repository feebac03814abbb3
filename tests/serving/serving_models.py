"""Small random models, ragged prompts and answers one by one, shared by the tests of serving."""

import dataclasses
import functools

import numpy as np
from flax import nnx

from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM, RopeConfig
from pyagent_kv_jax.serving.sampling import sample_seed

VOCAB = 97
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_ids=(VOCAB - 1,),
)


@functools.cache
def small_model():
    """Weights larger than at the usual start, so that the greedy answer wanders and depends on the whole prompt."""
    return enlarged(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)))


def enlarged(model):
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if param[...].ndim > 1:
            param[...] = param[...] * 4.0
    return model


def ragged_prompts(count, seed=0, longest=70):
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(0, np.log(longest), count)).astype(int)
    return [rng.integers(0, VOCAB - 1, length).tolist() for length in lengths]


GEMMA = LlamaConfig(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    local_rope=RopeConfig(10_000.0),
    rope=RopeConfig(1_000_000.0),
    qk_norm=True,
    layer_windows=(20, 20, 20, 20, 20, None),
    activation="gelu_tanh",
    norm_plus_one=True,
    post_norms=True,
    scale_embeddings=True,
    query_pre_attn_scalar=16,
    tie_word_embeddings=True,
    architecture="Gemma3ForCausalLM",
)


@functools.cache
def gemma_model():
    """Weights as they start: here the greedy answer wanders by itself."""
    return LlamaForCausalLM(GEMMA, rngs=nnx.Rngs(5)), GEMMA


def answers_of(results):
    return [answer for result in results for answer in (result, *result.other_samples)]


def separate(prompts, sampling):
    """The same answers as requests of one answer each."""
    pairs = [
        (prompt, dataclasses.replace(params, n=1, seed=sample_seed(params.seed, i)))
        for prompt, params in zip(prompts, sampling, strict=True)
        for i in range(params.n)
    ]
    return [prompt for prompt, _ in pairs], [params for _, params in pairs]
