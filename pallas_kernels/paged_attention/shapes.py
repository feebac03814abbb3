"""Attention shapes of real models, by name: what tests, tuning and benchmarks mean by "real"."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One model's attention, from its published configuration.

    Attributes:
        q_heads, kv_heads, head_dim: of every layer.
        layers: how many.
        scale: of the logits; None: 1 / sqrt(head_dim).
        sliding_window: of the layers that have one; None: no layer has.
        chunk_size: of the layers that attend in chunks; None: no layer does.
        logits_soft_cap: None: none.
        has_sinks: whether each head has a learned sink logit.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int
    scale: float | None = None
    sliding_window: int | None = None
    chunk_size: int | None = None
    logits_soft_cap: float | None = None
    has_sinks: bool = False


SHAPES = {
    "Llama-2-7B": AttentionShape(32, 32, 128, 32),
    "Llama-3-8B": AttentionShape(32, 8, 128, 32),
    "Llama-3-70B": AttentionShape(64, 8, 128, 80),
    "Llama-3.2-1B": AttentionShape(32, 8, 64, 16),
    "Llama-3.2-3B": AttentionShape(24, 8, 128, 28),
    "Llama-4-Scout": AttentionShape(40, 8, 128, 48, chunk_size=8192),
    "Mistral-7B-v0.1": AttentionShape(32, 8, 128, 32, sliding_window=4096),
    "Qwen2.5-0.5B": AttentionShape(14, 2, 64, 24),
    "Qwen2.5-1.5B": AttentionShape(12, 2, 128, 28),
    "Qwen2.5-7B": AttentionShape(28, 4, 128, 28),
    "Qwen3-0.6B": AttentionShape(16, 8, 128, 28),
    "Qwen3-4B": AttentionShape(32, 8, 128, 36),
    "Qwen3-32B": AttentionShape(64, 8, 128, 64),
    "Gemma-2-9B": AttentionShape(16, 8, 256, 42, scale=256**-0.5, sliding_window=4096, logits_soft_cap=50.0),
    "Gemma-3-1B": AttentionShape(4, 1, 256, 26, scale=256**-0.5, sliding_window=512),
    "Gemma-3-4B": AttentionShape(8, 4, 256, 34, scale=256**-0.5, sliding_window=1024),
    "Gemma-3-12B": AttentionShape(16, 8, 256, 48, scale=256**-0.5, sliding_window=1024),
    "Gemma-3-27B": AttentionShape(32, 16, 128, 62, scale=168**-0.5, sliding_window=1024),
    "Phi-3-mini": AttentionShape(32, 32, 96, 32, sliding_window=2047),
    "StableLM-3B": AttentionShape(32, 32, 80, 32),
    "gpt-oss-20b": AttentionShape(64, 8, 64, 24, sliding_window=128, has_sinks=True),
}
