"""A softmax-weighted sum taken a few keys at a time (Milakov and Gimelshein, arXiv 1805.02867), in float32."""

from __future__ import annotations

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax


class OnlineSoftmax(NamedTuple):
    """The state over the keys seen so far.

    Attributes:
        highest: f32[kv_heads, rows], the highest logit; -inf before the first key.
        total: f32[kv_heads, rows], the sum of exp(logit - highest).
        values: f32[kv_heads, rows, v_head_dim], the values weighted likewise.
    """

    highest: jax.Array
    total: jax.Array
    values: jax.Array

    @classmethod
    def start(cls, kv_heads: int, rows: int, v_head_dim: int, sinks: jax.Array | None) -> Self:
        """Over no keys. ``sinks`` f32[kv_heads, rows] are one logit more, which has no value."""
        values = jnp.zeros((kv_heads, rows, v_head_dim), jnp.float32)
        if sinks is None:
            sinks = jnp.full((kv_heads, rows), -jnp.inf, jnp.float32)
        return cls(sinks, (sinks > -jnp.inf).astype(jnp.float32), values)

    def add(self, logits: jax.Array, v: jax.Array) -> Self:
        """Over more keys: ``logits`` f32[kv_heads, rows, n], -inf where unseen; ``v`` f32[kv_heads, n, v_head_dim]."""
        highest = jnp.maximum(self.highest, jnp.max(logits, axis=-1))
        base = jnp.where(highest == -jnp.inf, 0, highest)  # exp(-inf - -inf) is NaN
        weights = jnp.exp(logits - base[..., None])
        decay = jnp.exp(self.highest - base)
        weighted = jnp.einsum("hmn,hnd->hmd", weights, v, precision=lax.Precision.HIGHEST)
        total = self.total * decay + jnp.sum(weights, axis=-1)
        return type(self)(highest, total, self.values * decay[..., None] + weighted)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """(out f32[kv_heads, rows, v_head_dim], lse f32[kv_heads, rows]): 0 and -inf where nothing was seen."""
        out = self.values / jnp.where(self.total > 0, self.total, 1)[..., None]
        return out, self.highest + jnp.log(self.total)
