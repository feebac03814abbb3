"""Gemma 3's ``config.json`` as published and as transformers writes it; its directories, with and without eyes."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pyagent_kv_jax.config import group_layers
from pyagent_kv_jax.errors import ConfigError, ModelLoadError
from pyagent_kv_jax.models import (
    LlamaConfig,
    LlamaForCausalLM,
    RopeConfig,
    config_from_hf,
    config_to_hf,
    load_model,
    save_model,
)

GOLDEN = Path(__file__).parent / "golden" / "gemma3"
LINEAR = {"rope_type": "linear", "factor": 8.0}
TEXT_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
VISION_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": LINEAR,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
SWITCHES = {
    "qk_norm": True,
    "tie_word_embeddings": True,
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embeddings": True,
    "architecture": "Gemma3ForCausalLM",
    "bos_token_id": 2,
    "eos_token_ids": (1, 106),
}


def test_1b():
    assert config_from_hf(TEXT_1B) == LlamaConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rope=RopeConfig(1_000_000.0),
        local_rope=RopeConfig(10_000.0),
        layer_windows=((512,) * 5 + (None,)) * 4 + (512,) * 2,
        query_pre_attn_scalar=256,
        **SWITCHES,
    )


def test_4b_with_a_vision_tower_says_little_and_the_defaults_the_rest():
    want = LlamaConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
        rope=RopeConfig(1_000_000.0, "linear", 8.0),
        local_rope=RopeConfig(10_000.0),
        layer_windows=((1024,) * 5 + (None,)) * 5 + (1024,) * 4,
        query_pre_attn_scalar=256,
        **SWITCHES,
    )
    assert config_from_hf(VISION_4B) == want
    no_ids = {key: value for key, value in VISION_4B.items() if key != "eos_token_id"}
    assert config_from_hf(no_ids).eos_token_ids == (1,)
    assert not config_from_hf(VISION_4B | {"tie_word_embeddings": False}).tie_word_embeddings


def test_both_styles_of_rope_say_the_same():
    old = TEXT_1B | {"rope_scaling": LINEAR, "rope_theta": 5e5, "rope_local_base_freq": 2e4}
    new = {key: value for key, value in TEXT_1B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "full_attention": LINEAR | {"rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert config_from_hf(new) == config_from_hf(old)
    assert config_from_hf(old).rope == RopeConfig(5e5, "linear", 8.0)
    assert config_from_hf(old).local_rope == RopeConfig(2e4)


def test_which_layers_slide():
    small = TEXT_1B | {"num_hidden_layers": 4, "sliding_window": 8}
    assert config_from_hf(small | {"sliding_window_pattern": 2}).layer_windows == (8, None) * 2
    assert config_from_hf(small | {"sliding_window_pattern": 1, "sliding_window": None}).layer_windows == ()
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert config_from_hf(small | {"layer_types": kinds}).layer_windows == (None, 8, 8, None)


def test_switches_that_published_models_leave_off():
    on = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30, "attention_bias": True}
    config = config_from_hf(TEXT_1B | on)
    assert (config.attn_logit_soft_cap, config.final_logit_soft_cap) == (50.0, 30)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    ("change", "got", "want"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu'", "'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True", "False"),
        ({"quantization_config": {"bits": 4}}, "{'bits': 4}", "None"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0", "positive number"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping '30'", "positive number"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping inf", "positive number"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar None", "positive number"),
        ({"query_pre_attn_scalar": -256}, "query_pre_attn_scalar -256", "positive number"),
        ({"rope_theta": True}, "rope_theta True", "positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0", "positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'", "default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "default"}}, "{'rope_type': 'default'}", "'full_attention' and 'sliding"),
        ({"rope_parameters": {"sliding_attention": LINEAR}}, "'linear' for sliding layers", "'default'"),
        ({"sliding_window": None}, "sliding_window None", "positive integer"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern 0", "positive integer"),
        ({"layer_types": ["full_attention"]}, "layer_types ['full_attention']", "26 'full_attention'"),
        ({"layer_types": ["chunked_attention"] * 26}, "'chunked_attention'", "'sliding_attention'"),
        ({"layer_types": "full_attention"}, "layer_types full_attention", "26 'full_attention'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'", "positive number"),
        ({"head_dim": 0}, "head_dim 0", "positive integer"),
        ({"architectures": ["Gemma3nForCausalLM"]}, "'Gemma3nForCausalLM'", "Gemma3ForCausalLM, Gemma3ForCond"),
        ({"model_type": "gemma3"}, "text_config None", "model_type 'gemma3_text'"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "text_config 'llama'", "'gemma3_text'"),
    ],
)
def test_refused(change, got, want):
    with pytest.raises(ModelLoadError) as error:
        config_from_hf(TEXT_1B | change)
    said_got, said_want = str(error.value).split(", want", 1)
    assert got in said_got
    assert want in said_want


def test_quantized_around_the_text_part_is_refused():
    with pytest.raises(ModelLoadError, match=r"got quantization_config \{'bits': 4\}"):
        config_from_hf(VISION_4B | {"quantization_config": {"bits": 4}})


@pytest.mark.parametrize("raw", [TEXT_1B, VISION_4B, TEXT_1B | {"sliding_window_pattern": 1}])
def test_config_round_trip(raw):
    config = config_from_hf(raw)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_norms": False}, "post_norms: got False, want True for a Gemma3ForCausalLM"),
        ({"layer_windows": (4, 8) * 13}, r"layer_windows: got \(4, 8.*want \(4, 4"),
        ({"local_rope": None}, "local_rope: got None, want RopeConfig"),
        ({"architecture": "Qwen3ForCausalLM"}, "got .* for a Qwen3ForCausalLM"),
    ],
)
def test_a_config_that_the_file_cannot_express_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config_to_hf(dataclasses.replace(config_from_hf(TEXT_1B), **change))


def test_kv_cache_config_by_groups():
    config = config_from_hf(TEXT_1B)
    sizes = {"num_blocks": 10, "max_model_len": 512}
    grouped = config.kv_cache_config(group_layers=True, **sizes)
    assert grouped.layer_groups == group_layers(config.layer_windows)
    assert {group.sliding_window for group in grouped.groups} == {None, 512}
    assert config.kv_cache_config(**sizes).layer_groups == ()
    full = dataclasses.replace(config, layer_windows=())
    assert full.kv_cache_config(group_layers=True, **sizes).layer_groups == ()


# -- directories -----------------------------------------------------------------------------------------------


def parameters(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def randomized(model):
    """Norms and biases too, which start at zero."""
    draw = np.random.default_rng(4)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), state))


VISION_NAMES = [
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    "multi_modal_projector.mm_input_projection_weight",
]
WRITERS = {
    "in files": ("language_model.model.", "language_model.lm_head.", ""),
    "in memory": ("model.language_model.", "lm_head.", "model."),
}


def with_vision_tower(directory, writer, extra=()):
    """Of ``gemma3_switches`` or ``gemma3``: the same model inside one that reads images."""
    body, head, vision = WRITERS[writer]
    tensors = load_file(directory / "model.safetensors")
    renamed = {
        name.replace("model.", body, 1) if name.startswith("model.") else name.replace("lm_head.", head, 1): tensor
        for name, tensor in tensors.items()
    }
    eyes = {vision + name: np.ones(3, np.float32) for name in VISION_NAMES} | dict.fromkeys(extra, np.ones(3))
    save_file(renamed | eyes, directory / "model.safetensors")
    text = json.loads((directory / "config.json").read_text())
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.fixture(params=["gemma3", "gemma3_switches"])
def copied(request, tmp_path):
    return Path(shutil.copytree(GOLDEN.parent / request.param, tmp_path / request.param))


@pytest.mark.parametrize("writer", WRITERS)
def test_text_part_of_a_model_with_a_vision_tower(copied, writer):
    want, want_config = load_model(copied, dtype=jnp.float32)
    loaded, config = load_model(with_vision_tower(copied, writer), dtype=jnp.float32)
    assert config == want_config
    chex.assert_trees_all_equal(parameters(loaded), parameters(want))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("language_model.model.extra", "got tensors model.extra, want none"),
        ("audio_tower.weight", "got tensors audio_tower.weight, want none"),
        ("visions", "got tensors visions, want none"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight and .*, want one model.norm.weight"),
    ],
)
def test_any_other_tensor_beside_the_text_part_is_refused(tmp_path, extra, message):
    directory = with_vision_tower(shutil.copytree(GOLDEN, tmp_path / "copied"), "in files", [extra])
    with pytest.raises(ModelLoadError, match=message):
        load_model(directory)


def test_vision_tensors_have_no_place_in_a_text_model(tmp_path):
    directory = shutil.copytree(GOLDEN, tmp_path / "copied")
    text = (directory / "config.json").read_text()
    with_vision_tower(directory, "in files")
    (directory / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"got no tensor model\."):
        load_model(directory)
    tensors = load_file(GOLDEN / "model.safetensors") | {VISION_NAMES[0]: np.ones(3, np.float32)}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"got tensors vision_tower\."):
        load_model(directory)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_and_load(tmp_path, dtype):
    raw = json.loads((GOLDEN.parent / "gemma3_switches" / "config.json").read_text())
    config = config_from_hf(raw | {"num_hidden_layers": 3, "layer_types": None, "sliding_window_pattern": 2})
    model = randomized(LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(3)))
    save_model(model, tmp_path / "new")
    loaded, loaded_config = load_model(tmp_path / "new", dtype=dtype)
    assert loaded_config == config
    chex.assert_trees_all_equal(parameters(loaded), parameters(model))


@pytest.mark.parametrize(("name", "stored"), [("gemma3", jnp.float16), ("gemma3_switches", jnp.bfloat16)])
def test_a_saved_model_has_the_tensors_transformers_wrote(tmp_path, name, stored):
    model, _ = load_model(GOLDEN.parent / name, dtype=stored)
    save_model(model, tmp_path)
    theirs, ours = (load_file(path / "model.safetensors") for path in (GOLDEN.parent / name, tmp_path))
    chex.assert_trees_all_equal(ours, theirs)


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    model, config = load_model(GOLDEN, dtype=jnp.float32)
    model.config = dataclasses.replace(config, scale_embeddings=False)
    with pytest.raises(ConfigError, match="scale_embeddings: got False, want True"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
