"""Hugging Face ``config.json`` to ``LlamaConfig`` and back, as written by transformers 4 and 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pyagent_kv_jax.errors import ConfigError, ModelLoadError
from pyagent_kv_jax.models import hf_gemma3
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.hf_fields import layer_types, layer_windows, number, refuse_other_than, size
from pyagent_kv_jax.models.hf_rope import rope_from_hf, rope_scaling

# By class name: its model_type, and what counts where config.json has no such key.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "max_position_embeddings": 32768, "head_dim": 128},
    hf_gemma3.ARCHITECTURE: {"model_type": "gemma3_text", **hf_gemma3.DEFAULTS},
}


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """Read the content of a ``config.json``; of a Gemma 3 with a vision tower, the text part.

    Raises:
        ModelLoadError: an architecture, rope type or switch that is not supported here, a missing key, or
            head counts that do not divide.
    """
    if hf_gemma3.has_vision_tower(raw):
        raw = hf_gemma3.text_config(raw)
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    raw = {"rms_norm_eps": 1e-6, **family, **raw, "model_type": family["model_type"]}
    refuse_other_than(raw, {"partial_rotary_factor": 1.0, "quantization_config": None})
    num_heads = size(raw, "num_attention_heads")
    num_kv_heads = size(raw, "num_key_value_heads", default=num_heads)
    hidden_size = size(raw, "hidden_size")
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"config.json: got num_key_value_heads {num_kv_heads}, want a divisor of {num_heads} heads"
        )
    num_layers = size(raw, "num_hidden_layers")
    is_gemma3 = architecture == hf_gemma3.ARCHITECTURE
    return LlamaConfig(
        vocab_size=size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size(raw, "head_dim", default=family.get("head_dim", hidden_size // num_heads)),
        max_position_embeddings=size(raw, "max_position_embeddings", default=family["max_position_embeddings"]),
        rms_norm_eps=float(number(raw, "rms_norm_eps")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        architecture=architecture,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
        **(hf_gemma3.switches_from_hf(raw, num_layers) if is_gemma3 else _switches_from_hf(raw, num_layers)),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of a ``config.json`` that transformers, and ``config_from_hf``, read back as ``config``.

    Raises:
        ConfigError: the architecture has no such model (switches of another family, windows of two widths), so that
            another one would be read back.
    """
    is_gemma3 = config.architecture == hf_gemma3.ARCHITECTURE
    raw = {
        "architectures": [config.architecture],
        "model_type": _FAMILIES[config.architecture]["model_type"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        **(hf_gemma3.switches_to_hf(config) if is_gemma3 else _switches_to_hf(config)),
    }
    _check_says_all(raw, config)
    return raw


def _check_says_all(raw: Mapping[str, Any], config: LlamaConfig) -> None:
    said = config_from_hf(raw)
    for field in dataclasses.fields(config):
        name, got, want = field.name, getattr(config, field.name), getattr(said, field.name)
        if got != want:
            raise ConfigError(f"LlamaConfig.{name}: got {got!r}, want {want!r} for a {config.architecture}")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """``eos_token_id`` as found in the wild: one id, several, or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _architecture(raw: Mapping[str, Any]) -> str:
    by_model_type = {family["model_type"]: name for name, family in _FAMILIES.items()}
    found = (raw.get("architectures") or [by_model_type.get(raw.get("model_type", ""))])[0]
    if found not in _FAMILIES:
        got = f"architecture {found!r} (model_type {raw.get('model_type')!r})"
        wanted = ", ".join([*_FAMILIES, hf_gemma3.WITH_VISION])
        raise ModelLoadError(f"config.json: got {got}, want one of {wanted}")
    return found


def _switches_from_hf(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields in which Llama, Qwen2 and Qwen3 differ; for some config.json has no key, so the family decides."""
    refuse_other_than(raw, {"hidden_act": "silu"})
    model_type, bias = raw["model_type"], bool(raw.get("attention_bias", False))
    # transformers 5 keeps it in ``rope_parameters``, 4 in ``rope_theta`` and ``rope_scaling``.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return {
        "rope": rope_from_hf(scaling, raw.get("rope_theta", 10_000.0)),
        "qkv_bias": model_type == "qwen2" or bias,
        "o_bias": model_type != "qwen2" and bias,
        "mlp_bias": model_type == "llama" and bool(raw.get("mlp_bias", False)),
        "qk_norm": model_type == "qwen3",
        "layer_windows": _layer_windows(raw, num_layers) if model_type != "llama" else (),
    }


def _switches_to_hf(config: LlamaConfig) -> dict[str, Any]:
    sliding = layer_types(config.layer_windows)
    return {
        "hidden_act": "silu",
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        **({"use_sliding_window": True, **sliding} if sliding else {}),
    }


def _layer_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Off unless ``use_sliding_window``; then by ``layer_types``, or all from ``max_window_layers`` on."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return ()
    first = raw.get("max_window_layers", 28)
    return layer_windows(raw, ["sliding_attention" if n >= first else "full_attention" for n in range(num_layers)])
