"""The plainest ``LayerCache``: stores nothing, and attends over the tokens of the call by brute force."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptAttention:
    """Every sequence comes whole, from its first token on, in one call."""

    def attend(self, layer, q, k, v, meta, *, scale=None, sliding_window=None, logits_soft_cap=None, sinks=None):
        """One [T, T] mask for the ragged batch: same row, not later, inside the window."""
        tokens = jnp.arange(q.shape[0])
        row = jnp.searchsorted(meta.query_start_loc, tokens, side="right")
        distance = tokens[:, None] - tokens[None, :]
        seen = (row[:, None] == row[None, :]) & (distance >= 0)
        if sliding_window is not None:
            seen &= distance < sliding_window
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k, precision="highest") * (
            q.shape[-1] ** -0.5 if scale is None else scale
        )
        if logits_soft_cap is not None:
            scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        v = jnp.where(jnp.isnan(v), 0, v)  # padding may be NaN, and 0 * NaN is NaN
        return jnp.einsum("hqk,khd->qhd", weights, v, precision="highest"), self


def prompt_metadata(lengths: list[int], num_tokens: int) -> AttentionMetadata:
    """Metadata of whole sequences one after another, padded to ``num_tokens``; no blocks."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(num_tokens - starts[-1])])
    return AttentionMetadata(
        block_tables=np.full((len(lengths), 1), -1, np.int32),
        kv_lens=np.array(lengths, np.int32),
        query_start_loc=starts,
        slot_mapping=np.full(num_tokens, -1, np.int32),
        positions=positions.astype(np.int32),
        ok=np.ones(len(lengths), bool),
    )
