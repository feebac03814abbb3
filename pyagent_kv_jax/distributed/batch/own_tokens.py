"""Causal attention of a step's tokens to one another, where no request has any from before."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.kv_pages import KVPages, page_shapes
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.on_ranks import on_ranks, static_and_arrays
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages


def attend_to_own_tokens(
    pages: ShardedKVPages,
    layer: ArrayLike,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: AttentionMetadata,
    *,
    sinks: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The self pass of prefill (DCP of vLLM) for a batch that has no other: nothing is exchanged between ranks.

    K and V of new tokens are on every rank of the context axis, so each rank attends with the query heads it owns to
    all of them. They are laid out in scratch pages, by the same write and read by the same kernel as the cache's: in
    the cache's element type, quantised with its scales, so that the result is what a read of the cache would give.

    Args:
        pages: the cache; only its kind and scales are used.
        layer: i32[], may be traced.
        q: [T, q_heads, head_dim].
        k: [T, num_heads, head_dim].
        v: [T, num_heads, v_head_dim].
        meta: ``ExecutionPlan.own_tokens``.
        sinks: f32[q_heads].
        **options: as for ``KVPages.attend``.

    Returns:
        (out [T, q_heads, v_head_dim] of q's dtype, lse f32[T, q_heads]), heads spread as
        ``CacheSharding.q_head_axes`` says.
    """
    sharding, config = pages.sharding, pages.config
    on_rank, axes = sharding.on_rank(config), sharding.q_head_axes(q.shape[1])
    scattered = sharding.context_axis is not None and sharding.context_axis in axes
    static, arrays = static_and_arrays(options)
    copies = sharding.head_copies(config.num_heads)
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))

    def attend(q: Any, k: Any, v: Any, scales: Any, layer: Any, meta: Any, sinks: Any, arrays: Any) -> Any:
        group = q.shape[1] * (sharding.context_size if scattered else 1) // on_rank.num_heads
        first = lax.axis_index(sharding.context_axis) * q.shape[1] if scattered else 0
        heads = kv_heads_read(first, q.shape[1], group)
        mine = [None if s is None else lax.dynamic_index_in_dim(s, layer)[:, heads] for s in scales]
        scratch = _scratch_pages(on_rank, heads.shape[0], meta, q.shape[0], *mine)
        out, lse, _ = scratch.attend_share(0, q, k[:, heads], v[:, heads], meta, sinks=sinks, **static, **arrays)
        return out, lse

    q_heads, kv_heads = P(None, axes or None), P(None, sharding.tensor_axis)
    in_specs = q_heads, kv_heads, kv_heads, kv_heads, P(), P(), P(axes or None), P()
    mapped = on_ranks(attend, sharding.mesh, in_specs, (q_heads, q_heads))
    scales = (pages.k_scale, pages.v_scale)
    return mapped(q, k, v, scales, jnp.asarray(layer, jnp.int32), meta, sinks, arrays)


def queries_a_head(num_q_heads: int, group: int) -> int:
    """Consecutive query heads, of ``num_q_heads`` that start at a multiple of their number, that surely read one KV
    head, where each KV head serves ``group``."""
    return math.gcd(num_q_heads, group)


def kv_heads_read(first: ArrayLike, num_q_heads: int, group: int) -> jax.Array:
    """KV heads i32[num_q_heads / n] that query heads ``first`` on read, one for each n = ``queries_a_head`` of them.

    A rank's heads may begin or end within a group: then a KV head serves fewer, or stands here more than once.
    """
    served = queries_a_head(num_q_heads, group)
    return jnp.asarray(first + jnp.arange(num_q_heads // served, dtype=jnp.int32) * served) // group


def _scratch_pages(
    on_rank: KVCacheConfig, num_heads: int, meta: AttentionMetadata, num_tokens: int, k_scale: Any, v_scale: Any
) -> KVPages:
    """Pages of zeros for T tokens of R rows, each from the start of a page on; of one layer and ``num_heads`` heads."""
    config = dataclasses.replace(
        on_rank,
        num_layers=1,
        layer_groups=(),
        num_heads=num_heads,
        num_blocks=num_tokens // on_rank.page_size + meta.kv_lens.shape[0],
        block_size=on_rank.page_size,
        kernel_block_size=None,
        num_kernel_blocks=None,
    )
    k_pages, v_pages = (jnp.zeros(shape, config.storage_dtype) for shape in page_shapes(config))
    return KVPages(k_pages, v_pages, k_scale, v_scale, config)
