"""What golden float32 logits cannot show of Gemma 3: its roundings in bfloat16; and its window, token by token."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pyagent_kv_jax.errors import ConfigError
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM, RopeConfig
from pyagent_kv_jax.models.layers import RMSNorm
from tests.models.prompt_attention import PromptAttention, prompt_metadata

WINDOW, LENGTH = 6, 17
CONFIG = LlamaConfig(
    50,
    40,
    48,
    1,
    4,
    2,
    8,
    local_rope=RopeConfig(100.0),
    qk_norm=True,
    layer_windows=(WINDOW,),
    activation="gelu_tanh",
    norm_plus_one=True,
    post_norms=True,
    scale_embeddings=True,
    query_pre_attn_scalar=10,
    tie_word_embeddings=True,
    architecture="Gemma3ForCausalLM",
)


def bf16(x):
    return x.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_windows": (4, None)}, r"layer_windows: got \(4, None\), want one for each of 1 layers"),
        ({"activation": "relu"}, r"activation: got 'relu', want one of \('silu', 'gelu_tanh'\)"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_norm_rounds_once_and_last():
    draw = np.random.default_rng(0)
    x, weight = bf16(draw.normal(size=(64, 40))), bf16(0.3 * draw.normal(size=40))
    norm = RMSNorm(40, CONFIG, jnp.bfloat16)
    norm.weight[...] = weight
    wide = x.astype(np.float64)
    wide /= np.sqrt(np.mean(wide**2, -1, keepdims=True) + CONFIG.rms_norm_eps)
    want = bf16(wide * (1 + weight.astype(np.float64)))
    assert np.mean(np.asarray(norm(x)) != want) < 0.001  # but for a float32 error at the middle of two bfloat16
    early = bf16(bf16(wide) * bf16(1 + weight.astype(np.float64)))
    assert np.mean(early != want) > 0.1  # the case can tell


def test_embedding_factor_is_rounded_to_the_dtype_of_the_weights():
    model = LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens, rows = np.arange(50), np.asarray(model.embed_tokens.weight[...]).astype(np.float64)
    got = np.asarray(model.embed_tokens(tokens))
    chex.assert_trees_all_equal(got, bf16(rows * 6.3125))  # sqrt(40) is 6.3246
    assert np.mean(got != bf16(rows * 40**0.5)) > 0.1
    assert np.isnan(np.asarray(model.embed_tokens(np.array([50, -1])), np.float32)).all()


@pytest.mark.parametrize("window", [WINDOW, None])
def test_a_query_sees_as_many_tokens_as_its_window_itself_included(window):
    config = dataclasses.replace(CONFIG, layer_windows=(window,) if window else ())
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(1))
    tokens = np.random.default_rng(2).integers(0, 50, LENGTH).astype(np.int32)
    logits_of = jax.jit(lambda tokens: model(tokens, PromptAttention(), prompt_metadata([LENGTH], LENGTH))[0])
    plain = np.asarray(logits_of(tokens))
    for place in range(LENGTH):
        changed = tokens.copy()
        changed[place] = (changed[place] + 7) % 50
        sees = np.abs(np.asarray(logits_of(changed)) - plain).max(axis=-1) > 0
        query = np.arange(LENGTH)
        chex.assert_trees_all_equal(sees, (query >= place) & (query - place < (window or LENGTH)))


def test_norms_start_as_a_factor_of_one():
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    norms = [leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "norm" in str(path[-2])]
    assert len(norms) == 7
    assert not any(np.any(leaf[...]) for leaf in norms)
