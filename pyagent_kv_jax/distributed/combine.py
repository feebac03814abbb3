"""From each context rank's share of attention, for many heads, to the whole of it, for the rank's own heads."""

from __future__ import annotations

from enum import StrEnum

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import merge_attention_states


class Combine(StrEnum):
    """How ranks that hold different tokens put their shares of attention together.

    ``ALL_TO_ALL``: each rank sends every other one its share of that one's heads, LSE and all, in one exchange; a merge
    on the spot follows. ``REDUCE_SCATTER``: LSEs are gathered, outputs rescaled by them and reduce-scattered over the
    heads. ``ALL_REDUCE``: every rank ends with all heads, by an ``AllReduceStrategy``. The results agree.
    """

    ALL_TO_ALL = "all_to_all"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"


def all_to_all_states(out: jax.Array, lse: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Merge over ``axis`` of C ranks, within ``shard_map``; rank r ends with the r-th part of the heads.

    One all-to-all of ``T * H`` states, each of its output and the f32 LSE, bit for bit.

    Args:
        out: floating [T, H, d], of this rank's keys; H is a multiple of C.
        lse: f32[T, H], natural log.
        axis: name.

    Returns:
        (out [T, H / C, d] of the same dtype, lse f32[T, H / C]).
    """
    size = lax.axis_size(axis)
    states = lax.all_to_all(_packed(out, lse), axis, split_axis=1, concat_axis=1, tiled=True)  # [T, C * H / C, words]
    tokens, heads, words = states.shape
    by_rank = states.reshape(tokens, size, heads // size, words).swapaxes(0, 1)
    return merge_attention_states(*_unpacked(by_rank, out.dtype))


def reduce_scatter_states(out: jax.Array, lse: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """As ``all_to_all_states``, by an all-gather of the LSEs and a reduce-scatter of the rescaled outputs, in f32."""
    size, rank = lax.axis_size(axis), lax.axis_index(axis)
    lses = lax.all_gather(lse.astype(jnp.float32), axis)  # [C, T, H]
    seen = jnp.isfinite(lses)  # as merge_attention_states: +inf and NaN saw nothing either
    highest = jnp.max(jnp.where(seen, lses, -jnp.inf), axis=0)
    base = jnp.where(jnp.isfinite(highest), highest, 0)  # exp(-inf - -inf) is NaN
    weights = jnp.where(seen, jnp.exp(lses - base), 0)
    total = jnp.sum(weights, axis=0)
    share = weights[rank] / jnp.where(total > 0, total, 1)
    # Selected, not multiplied: what saw nothing may hold NaN.
    rescaled = jnp.where(seen[rank][..., None], out.astype(jnp.float32) * share[..., None], 0)
    merged = lax.psum_scatter(rescaled, axis, scatter_dimension=1, tiled=True).astype(out.dtype)
    heads = lse.shape[-1] // size
    return merged, lax.dynamic_slice_in_dim(base + jnp.log(total), rank * heads, heads, axis=1)


def _packed(out: jax.Array, lse: jax.Array) -> jax.Array:
    """[..., d + f32 in words of out's dtype]: outputs and LSEs as one array of plain words, to travel together."""
    words = _words_of(out.dtype)
    lse_words = lax.bitcast_convert_type(lse.astype(jnp.float32), words)
    lse_words = lse_words.reshape(*lse.shape, -1)
    return jnp.concatenate([lax.bitcast_convert_type(out, words), lse_words], axis=-1)


def _unpacked(states: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    count = 4 // jnp.dtype(dtype).itemsize
    out, lse_words = states[..., :-count], states[..., -count:]
    lse = lax.bitcast_convert_type(lse_words if count > 1 else lse_words[..., 0], jnp.float32)
    return lax.bitcast_convert_type(out, dtype), lse


def _words_of(dtype: jnp.dtype) -> jnp.dtype:
    """The unsigned integer as wide as a float of 2 or 4 bytes."""
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
