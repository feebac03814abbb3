"""What is Gemma 3's own in a Hugging Face directory: the keys of its config, and the vision tower around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.hf_fields import layer_types, layer_windows, number, optional_number, refuse_other_than, size
from pyagent_kv_jax.models.hf_rope import rope_from_hf, rope_scaling

ARCHITECTURE = "Gemma3ForCausalLM"
WITH_VISION = "Gemma3ForConditionalGeneration"

# What transformers takes where config.json says nothing; published files leave most of it out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}

# Of the language model in a checkpoint with a vision tower: as stored, and as a text checkpoint has it.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION_PREFIXES = tuple(
    f"{head}{part}." for head in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def has_vision_tower(raw: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` describes a Gemma 3 that reads images; of that one, only the text part is loaded."""
    return raw.get("model_type") == "gemma3" or (raw.get("architectures") or [None])[0] == WITH_VISION


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the text part alone, of one with a vision tower.

    Raises:
        ModelLoadError: no ``text_config``, or one of another model.
    """
    text = raw.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type", "gemma3_text") != "gemma3_text":
        got = text.get("model_type") if isinstance(text, Mapping) else text
        raise ModelLoadError(f"config.json: got text_config {got!r}, want one of model_type 'gemma3_text'")
    outer = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    return {**text, **{key: raw[key] for key in outer if key in raw}, "architectures": [ARCHITECTURE]}


def text_tensor_name(name: str) -> str | None:
    """What a text checkpoint calls a tensor of one with a vision tower; None: the tower's, not read.

    transformers 4 and 5 write ``language_model.model.`` to files and say ``model.language_model.`` in memory, from
    where other writers take it.
    """
    if name.startswith(_VISION_PREFIXES):
        return None
    stored = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), "")
    return _TEXT_PREFIXES.get(stored, "") + name.removeprefix(stored)


def switches_from_hf(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields of ``LlamaConfig`` in which Gemma 3 differs.

    ``attn_logit_softcapping`` is obeyed. (transformers 5.23 keeps it in the model without applying it; in published
    checkpoints it is null.)

    Raises:
        ModelLoadError: a switch that is not supported, or a useless value.
    """
    refuse_other_than(raw, {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False})
    pattern = size(raw, "sliding_window_pattern")
    kinds = ["sliding_attention" if layer % pattern else "full_attention" for layer in range(1, num_layers + 1)]
    rope, local_rope = _ropes(raw)
    return {
        "rope": rope,
        "local_rope": local_rope,
        "qkv_bias": bool(raw.get("attention_bias", False)),
        "o_bias": bool(raw.get("attention_bias", False)),
        "qk_norm": True,
        "layer_windows": layer_windows(raw, kinds),
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "post_norms": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": number(raw, "query_pre_attn_scalar"),
        "attn_logit_soft_cap": optional_number(raw, "attn_logit_softcapping"),
        "final_logit_soft_cap": optional_number(raw, "final_logit_softcapping"),
    }


def switches_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The keys that ``switches_from_hf`` reads."""
    return {
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
        "rope_local_base_freq": (config.local_rope or config.rope).theta,
        "attention_bias": config.o_bias,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_soft_cap,
        "final_logit_softcapping": config.final_logit_soft_cap,
        # Full layers only: still to be said, or transformers takes its own default for them.
        **(layer_types(config.layer_windows) or {"layer_types": ["full_attention"] * config.num_layers}),
    }


def _ropes(raw: Mapping[str, Any]) -> tuple[Any, Any]:
    """Of full and of sliding layers. transformers 5 keeps both in ``rope_parameters``, 4 in three keys."""
    by_kind = raw.get("rope_parameters") or {}
    if not isinstance(by_kind, Mapping) or set(by_kind) - {"full_attention", "sliding_attention"}:
        raise ModelLoadError(
            f"config.json: got rope_parameters {by_kind}, want them for 'full_attention' and 'sliding_attention'"
        )
    full = {**(by_kind.get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    rope = rope_from_hf(full, raw["rope_theta"])
    local = rope_from_hf(by_kind.get("sliding_attention") or {}, raw["rope_local_base_freq"])
    if local.kind != "default":  # transformers 4 has no key for it
        raise ModelLoadError(f"config.json: got rope type {local.kind!r} for sliding layers, want 'default'")
    return rope, local
