"""Merge in XLA; runs anywhere; the definition of correct."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge ``outs`` [n, ..., heads, d] by ``lses`` [n, ..., heads] over n; see the public function."""
    lses = lses.astype(jnp.float32)
    seen = jnp.isfinite(lses)  # -inf: saw nothing. +inf and NaN: no softmax ever made them, so neither counts
    highest = jnp.max(jnp.where(seen, lses, -jnp.inf), axis=0)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)  # exp(-inf - -inf) is NaN
    weights = jnp.where(seen, jnp.exp(lses - highest), 0)
    total = jnp.sum(weights, axis=0)
    # Selected, not multiplied: a state that saw nothing may hold NaN, and 0 * NaN is NaN.
    picked = jnp.where(seen[..., None], outs.astype(jnp.float32), 0) * weights[..., None]
    out = jnp.sum(picked, axis=0) / jnp.where(total > 0, total, 1)[..., None]
    return out.astype(outs.dtype), highest + jnp.log(total)
