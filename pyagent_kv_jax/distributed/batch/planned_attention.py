"""A plan executed on one layer: as a function for a jit of the user's own, and compiled by itself."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.distributed.batch.own_tokens import attend_to_own_tokens
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages


class BatchOutput(NamedTuple):
    """What ``run`` gives.

    Attributes:
        out: [T, q_heads, v_head_dim] of q's dtype; 0 for padding.
        lse: f32[T, q_heads], natural log; -inf for padding.
        pages: the cache after the step's K and V were written.
    """

    out: jax.Array
    lse: jax.Array
    pages: ShardedKVPages


def attend_planned(
    pages: ShardedKVPages,
    layer: ArrayLike,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: AttentionMetadata,
    own_tokens: AttentionMetadata | None,
    **options: Any,
) -> BatchOutput:
    """Write a step's K and V of ``layer``, then attend causally over all that its requests hold. For use under ``jit``.

    Where some request has context: one pass over the pages after the write, which hold the new tokens too. Prefill
    there is usually told as a context pass with gathered queries over local K and V, a causal self pass, and a merge.
    The one pass sends the same bytes (the queries, and the shares of the result), computes the same, each rank its
    share of the new tokens too instead of all ranks all of them, and needs one kernel and one merge less.

    Where none has: see ``attend_to_own_tokens``; nothing is exchanged.

    Args:
        pages: donate them.
        layer: i32[], may be traced.
        q: [T, q_heads, head_dim].
        k: [T, num_heads, head_dim].
        v: [T, num_heads, v_head_dim].
        meta: ``ExecutionPlan.meta``.
        own_tokens: ``ExecutionPlan.own_tokens``.
        **options: as for ``KVPages.attend``.
    """
    if own_tokens is None:
        return BatchOutput(*pages.attend_with_lse(layer, q, k, v, meta, **options))
    out, lse = attend_to_own_tokens(pages, layer, q, k, v, own_tokens, **options)
    return BatchOutput(out, lse, pages.write(layer, k, v, meta.slot_mapping))


@dataclasses.dataclass
class CompiledAttention:
    """The programs of one config; executors of the same config share them.

    Attributes:
        run: ``run(pages, layer, q, k, v, meta, own_tokens, arrays, static)``, the pages donated. ``arrays`` are options
            that may change from call to call, ``static`` pairs of those that are part of the program.
        cut: ``cut(q, k, v, start, size=...)``: tokens ``start`` to ``start + size`` of each, 0 past the end.
        put: ``put(out, lse, part, part_lse, start)``: the tokens of a part into place, parts in order; ``out`` and
            ``lse`` are donated.
        num_traces: how often ``run`` was traced, i.e. compiled.
    """

    run: Any
    cut: Any
    put: Any
    num_traces: int = 0


@lru_cache(maxsize=32)
def compiled_attention(config: DCPPlanConfig) -> CompiledAttention:
    """The programs of ``config``."""

    def run(
        pages: Any, layer: Any, q: Any, k: Any, v: Any, meta: Any, own_tokens: Any, arrays: Any, static: Any
    ) -> BatchOutput:
        programs.num_traces += 1  # runs only while tracing
        return attend_planned(pages, layer, q, k, v, meta, own_tokens, **arrays, **dict(static))

    q_place, kv_place = config.q_sharding, config.kv_sharding
    programs = CompiledAttention(
        run=jax.jit(run, donate_argnums=0, static_argnums=8),
        cut=partial(jax.jit, static_argnames="size", out_shardings=(q_place, kv_place, kv_place))(_cut),
        put=jax.jit(_put, donate_argnums=(0, 1), out_shardings=(q_place, q_place)),
    )
    return programs


def _cut(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, *, size: int) -> tuple[jax.Array, ...]:
    if not q.shape[0]:  # of a batch of no tokens; there is nothing to take from
        return tuple(jnp.zeros((size, *x.shape[1:]), x.dtype) for x in (q, k, v))
    at = start + jnp.arange(size, dtype=jnp.int32)
    return tuple(jnp.take(x, at, axis=0, mode="fill", fill_value=0) for x in (q, k, v))


def _put(
    out: jax.Array, lse: jax.Array, part: jax.Array, part_lse: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    at = start + jnp.arange(part.shape[0], dtype=jnp.int32)  # padding is 0 and -inf like what it falls upon
    return out.at[at].set(part, mode="drop"), lse.at[at].set(part_lse, mode="drop")
