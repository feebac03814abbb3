"""``config.json`` as transformers 4 and 5 write it, and what is refused."""

import json
from pathlib import Path

import pytest

from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models import LlamaConfig, RopeConfig, config_from_hf, config_to_hf, load_config

GOLDEN = Path(__file__).parent / "golden"
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_SCALING,
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": None}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": None, "head_dim": 128}


def test_llama_3_1_8b():
    assert config_from_hf(LLAMA) == LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_both_styles_of_rope_say_the_same():
    new = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")}
    new["rope_parameters"] = LLAMA3_SCALING | {"rope_theta": 500000.0}
    assert config_from_hf(new) == config_from_hf(LLAMA)
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_from_hf(oldest).rope == RopeConfig(500000.0, "linear", 2.0)


def test_what_only_the_family_says():
    qwen2, qwen3 = config_from_hf(QWEN2), config_from_hf(QWEN3 | {"head_dim": None})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
    biased = config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    by_model_type = {key: value for key, value in QWEN3.items() if key != "architectures"}
    assert config_from_hf(by_model_type).architecture == "Qwen3ForCausalLM"


def test_sliding_windows():
    assert config_from_hf(QWEN2 | {"use_sliding_window": False, "sliding_window": 512}).layer_windows == ()
    by_count = config_from_hf(
        QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 30, "num_hidden_layers": 32}
    )
    assert by_count.layer_windows == (None,) * 30 + (512,) * 2
    kinds = ["sliding_attention", "full_attention"] * 16
    by_kind = config_from_hf(QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "layer_types": kinds})
    assert by_kind.layer_windows == (512, None) * 16


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_round_trip(name):
    config = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_generation_config_knows_the_stop_tokens_better(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 7}))
    assert load_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load_config(tmp_path).eos_token_ids == (5, 6)


def test_kv_cache_config():
    cache = config_from_hf(LLAMA).kv_cache_config(num_blocks=10, max_model_len=512)
    assert (cache.num_layers, cache.num_heads, cache.head_dim) == (32, 8, 128)
    assert (cache.num_blocks, cache.max_model_len) == (10, 512)


@pytest.mark.parametrize(
    ("change", "got", "want"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'", "Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "model_type 'bert'", "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'", "default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'llama3'", "low_freq_factor, high_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'", "'silu'"),
        ({"quantization_config": {"bits": 4}}, "{'bits': 4}", "None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0", "positive integer"),
        ({"vocab_size": None}, "vocab_size None", "positive integer"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5", "divisor of 32"),
    ],
)
def test_refused(change, got, want):
    with pytest.raises(ModelLoadError) as error:
        config_from_hf(LLAMA | change)
    said_got, said_want = str(error.value).split("want", 1)
    assert got in said_got
    assert want in said_want


def test_refused_layer_types():
    change = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}
    with pytest.raises(ModelLoadError, match=r"got layer_types \['full_attention'\], want 32"):
        config_from_hf(QWEN2 | change)
