"""Rotary embeddings in a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models.hf_fields import number
from pyagent_kv_jax.models.rope import RopeConfig

# Kind: our fields beside theta, and what Hugging Face calls them.
_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}


def rope_from_hf(scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    """From a ``rope_parameters`` (transformers 5, with its own ``rope_theta``) or ``rope_scaling`` (transformers 4).

    Raises:
        ModelLoadError: a kind that is not supported, a missing or useless value.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        raise ModelLoadError(f"config.json: got rope type {kind!r}, want one of {', '.join(_KINDS)}")
    missing = [key for key in _KINDS[kind].values() if key not in scaling]
    if missing:
        raise ModelLoadError(f"config.json: got {kind!r} rope scaling {dict(scaling)}, want also {', '.join(missing)}")
    fields: dict[str, Any] = {field: number(scaling, key) for field, key in _KINDS[kind].items()}
    return RopeConfig(theta=float(number({"rope_theta": theta, **scaling}, "rope_theta")), kind=kind, **fields)


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """``rope_scaling`` as transformers 4 writes it and both read it; theta has a key of its own there."""
    if rope.kind == "default":
        return None
    return {"rope_type": rope.kind, **{key: getattr(rope, field) for field, key in _KINDS[rope.kind].items()}}
