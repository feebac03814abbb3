"""A small random model and ragged prompts, shared by the tests of serving."""

import functools

import numpy as np
from flax import nnx

from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM

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
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if param[...].ndim > 1:
            param[...] = param[...] * 4.0
    return model


def ragged_prompts(count, seed=0, longest=70):
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(0, np.log(longest), count)).astype(int)
    return [rng.integers(0, VOCAB - 1, length).tolist() for length in lengths]
