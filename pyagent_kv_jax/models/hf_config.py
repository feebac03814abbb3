"""Hugging Face ``config.json`` to ``LlamaConfig`` and back, as written by transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.rope import RopeConfig

# What the class name alone decides: model_type, and the switches for which config.json may have no key.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "max_position_embeddings": 32768, "head_dim": 128},
}


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """Read the content of a ``config.json``.

    Raises:
        ModelLoadError: an architecture, rope type or switch that is not supported here, a missing key, or
            head counts that do not divide.
    """
    architecture = _architecture(raw)
    family = _FAMILIES[architecture]
    _refuse_unsupported(raw)
    num_heads = _size(raw, "num_attention_heads")
    num_kv_heads = _size(raw, "num_key_value_heads", default=num_heads)
    hidden_size = _size(raw, "hidden_size")
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"config.json: got num_key_value_heads {num_kv_heads}, want a divisor of {num_heads} heads"
        )
    attention_bias = bool(raw.get("attention_bias", False))
    num_layers = _size(raw, "num_hidden_layers")
    return LlamaConfig(
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_size(raw, "head_dim", default=family.get("head_dim", hidden_size // num_heads)),
        max_position_embeddings=_size(raw, "max_position_embeddings", default=family["max_position_embeddings"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family["model_type"] == "qwen2" or attention_bias,
        o_bias=family["model_type"] != "qwen2" and attention_bias,
        mlp_bias=family["model_type"] == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family["model_type"] == "qwen3",
        layer_windows=_layer_windows(raw, num_layers) if family["model_type"] != "llama" else (),
        architecture=architecture,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The content of a ``config.json`` that transformers, and ``config_from_hf``, read back as ``config``."""
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _FAMILIES[config.architecture]["model_type"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    windows = [window for window in config.layer_windows if window is not None]
    if windows:
        kinds = ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
        raw |= {"use_sliding_window": True, "sliding_window": windows[0], "layer_types": kinds}
    return raw


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
        raise ModelLoadError(f"config.json: got {got}, want one of {', '.join(_FAMILIES)}")
    return found


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"config.json: got {key} {value!r}, want a positive integer")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    wanted = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}
    for key, want in wanted.items():
        if raw.get(key, want) != want:
            raise ModelLoadError(f"config.json: got {key} {raw[key]!r}, want {want!r}")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """transformers 5 keeps it in ``rope_parameters``, 4 in ``rope_theta`` and ``rope_scaling``."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    wanted = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position": "original_max_position_embeddings",
        },
    }
    if kind not in wanted:
        raise ModelLoadError(f"config.json: got rope type {kind!r}, want one of {', '.join(wanted)}")
    missing = [key for key in wanted[kind].values() if key not in scaling]
    if missing:
        raise ModelLoadError(f"config.json: got {kind!r} rope scaling {dict(scaling)}, want also {', '.join(missing)}")
    return RopeConfig(theta=theta, kind=kind, **{field: scaling[key] for field, key in wanted[kind].items()})


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return scaling


def _layer_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Off unless ``use_sliding_window``; then by ``layer_types``, or all from ``max_window_layers`` on."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return ()
    window = _size(raw, "sliding_window")
    first = raw.get("max_window_layers", 28)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    kinds = raw.get("layer_types") or default
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelLoadError(
            f"config.json: got layer_types {kinds}, want {num_layers} 'full_attention' or 'sliding_attention'"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
