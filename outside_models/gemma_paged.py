"""Gemma 3 of the ``gemma`` package (Flax Linen), as it comes from PyPI, on a paged cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from gemma.gm.math._positional_embeddings import apply_rope
from gemma.gm.nn import _modules

from pyagent_kv_jax import AttentionMetadata
from pyagent_kv_jax.flax.linen import apply_with_cache, attend, has_cache


# [diff
class PagedAttention(_modules.Attention):
    def __call__(self, x, segment_pos, cache, attn_mask):
        if not has_cache(self):
            return super().__call__(x, segment_pos, cache, attn_mask)
        q, (k, v) = self.q_einsum("BTD,NDH->BTNH", x), self.kv_einsum("BSD,CKDH->CBSKH", x)
        rope = partial(apply_rope, positions=segment_pos, base_frequency=self.rope_base_frequency)
        q, k = rope(self._query_norm(q)), rope(self._key_norm(k))
        window = self.sliding_window_size if self.attn_type == _modules.AttentionType.LOCAL_SLIDING else None
        layer = int(self.path[0].removeprefix("layer_"))
        out = attend(self, layer, q, k, v, scale=self.query_pre_attn_scalar, sliding_window=window)
        return None, self.attn_vec_einsum("BTNH,NHD->BTD", out)


_modules.Attention = PagedAttention


# diff]
# [model
class PagedGemma(nnx.Module):
    def __init__(self, model: nn.Module, params: Any) -> None:
        self.model, self.params = model, nnx.Param(params)

    def __call__(
        self, tokens: jax.Array, cache: Any, meta: AttentionMetadata, *, logits_at: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        model, variables = self.model, {"params": self.params.get_value()}
        # [diff
        out, cache = apply_with_cache(model, variables, cache, meta, tokens[None], positions=meta.positions[None])
        # diff]
        return out.logits[0] if logits_at is None else out.logits[0, logits_at], cache
        # model]
