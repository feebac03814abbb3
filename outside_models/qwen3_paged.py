"""Qwen3 of google-tunix (Flax NNX), as it comes from PyPI, on a paged cache."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from tunix.models.qwen3 import model as qwen3

from pyagent_kv_jax import AttentionMetadata
from pyagent_kv_jax.flax import LayerHandle, SharedKVCache


# [diff
class PagedAttention(qwen3.Attention):
    def block(self, x, segment_pos, cache, attn_mask, segment_ids=None):
        if not isinstance(cache, LayerHandle):
            return super().block(x, segment_pos, cache, attn_mask, segment_ids)
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k = (qwen3.apply_rope(each, segment_pos, head_dim=self.head_dim) for each in (q, k))
        out, cache = cache.attend(q, k, v, scale=self.scale)
        return cache, self.o_proj(out)


qwen3.Attention = PagedAttention  # for models made from here on


# diff]
# [model
class PagedQwen3(nnx.Module):
    def __init__(self, model: qwen3.Qwen3) -> None:
        self.model = model

    def __call__(
        self, tokens: jax.Array, cache: Any, meta: AttentionMetadata, *, logits_at: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        # [diff
        shared = SharedKVCache(cache, meta)
        handles = shared.layers(f"layer_{i}" for i in range(self.model.config.num_layers))
        logits, _ = self.model(tokens[None], meta.positions[None], handles, None)
        # diff]
        return logits[0] if logits_at is None else logits[0, logits_at], shared.cache
        # model]
