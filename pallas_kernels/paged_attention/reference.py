"""Attention in XLA: runs anywhere, is the definition of correct, and is fast on CPU.

One loop over work items (a tile of queries of one sequence), inside it one loop over the columns of the block
table that the item really needs, a few pages a step, with an online softmax. Both loops end where the real
lengths end. No step makes a copy of the pool: pages are gathered by id, a step's worth at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.number_format import decode, per_head
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Item, Items, Sequences, Tables

TOKENS_A_STEP = 256
LARGEST_TILE = 64
SMALL_TILE = 8


@partial(
    jax.jit,
    static_argnames=("causal", "kv_dtype", "v_head_dim", "return_lse", "max_query_len", "max_kv_len"),
)
def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    causal: bool,
    sliding_window: Any,
    chunk_size: Any,
    block_positions: jax.Array | None,
    context_parallel: ContextParallel,
    scale: Any,
    logits_soft_cap: Any,
    sinks: jax.Array | None,
    k_scale: Any,
    v_scale: Any,
    kv_dtype: jnp.dtype,
    v_head_dim: int,
    return_lse: bool,
    max_query_len: int | None,
    max_kv_len: int | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention through a block table; see the public function."""
    num_pages, kv_heads, block_size, _ = k_pages.shape
    tokens, q_heads, head_dim = q.shape
    report_out_of_range("block_tables", block_tables, num_pages)
    group = q_heads // kv_heads
    width = block_tables.shape[1]
    tables = Tables.create(
        block_tables,
        block_positions,
        step=min(max(TOKENS_A_STEP // block_size, 1), width),
        num_pages=num_pages,
        block_size=block_size,
        context=context_parallel,
    )
    attention = _Attention(
        k_pages=k_pages,
        v_pages=v_pages,
        tables=tables,
        visibility=Visibility(causal, sliding_window, chunk_size),
        logits_soft_cap=logits_soft_cap,
        sinks=None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, group),
        kv_dtype=kv_dtype,
        v_head_dim=v_head_dim,
    )
    # Scales of K and of the logits are one factor of q; the scale of V is one factor of the output.
    q_scale = scale if k_scale is None else scale * per_head(k_scale)
    scaled = q.reshape(tokens, kv_heads, group, head_dim).astype(jnp.float32) * _by_head(q_scale)
    sequences = Sequences.create(query_start_loc, kv_lens, tokens)
    out, lse = attention.over_tokens(
        scaled, sequences, 1 if query_start_loc is None else max_query_len or tokens
    )
    if v_scale is not None:
        out = out * _by_head(v_scale)
    out = out.reshape(tokens, q_heads, v_head_dim).astype(q.dtype)
    return (out, lse.reshape(tokens, q_heads)) if return_lse else out


class _Softmax(NamedTuple):
    """A softmax under way, f32: highest logit and total weight [kv_heads, rows], weighted values [..., v_head_dim]."""

    highest: jax.Array
    total: jax.Array
    values: jax.Array


class _Attention(NamedTuple):
    """Everything that is the same for all items."""

    k_pages: jax.Array
    v_pages: jax.Array
    tables: Tables
    visibility: Visibility
    logits_soft_cap: Any
    sinks: jax.Array | None
    kv_dtype: jnp.dtype
    v_head_dim: int

    def over_tokens(self, q: jax.Array, sequences: Sequences, longest: int) -> tuple[jax.Array, jax.Array]:
        """Attention of q f32[tokens, kv_heads, group, head_dim], all scales in it.

        Sequences with few queries and with many (decode and prefill of a mixed batch) are served by two
        loops, so that a single query does not pay for a whole tile.
        """
        tokens = q.shape[0]
        largest_tile = min(LARGEST_TILE, _next_power_of_2(longest))
        q = jnp.pad(q, ((0, largest_tile), (0, 0), (0, 0), (0, 0)))
        out = jnp.zeros((*q.shape[:3], self.v_head_dim), jnp.float32)
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        if longest <= SMALL_TILE:
            lists = [sequences.items(longest, 1, None)]
        else:
            lists = [sequences.items(1, 1, 1), sequences.items(largest_tile, 2, None)]
        for items in lists:
            out, lse = self.over_items(q, items, out, lse)
        return out[:tokens], lse[:tokens]

    def over_items(
        self, q: jax.Array, items: Items, out: jax.Array, lse: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """``out`` and ``lse`` with the rows of all ``items`` filled in."""

        def body(index: jax.Array, outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            item = items.get(index)
            results = self.of_item(lax.dynamic_slice_in_dim(q, item.token, items.tile), item)
            row = jnp.arange(items.tile, dtype=jnp.int32)
            # Rows past the sequence belong to others; rows before position 0 see nothing, not even a sink.
            mine, seen = row < item.num_rows, row + item.position >= 0

            def put(output: jax.Array, result: jax.Array, empty: float) -> jax.Array:
                old = lax.dynamic_slice_in_dim(output, item.token, items.tile)
                new = _select(mine, _select(seen, result, empty), old)
                return lax.dynamic_update_slice_in_dim(output, new, item.token, 0)

            return put(outputs[0], results[0], 0.0), put(outputs[1], results[1], -jnp.inf)

        return lax.fori_loop(0, items.total, body, (out, lse))

    def of_item(self, q: jax.Array, item: Item) -> tuple[jax.Array, jax.Array]:
        """One tile q [tile, kv_heads, group, head_dim]: (out [tile, kv_heads, group, v_head_dim], lse)."""
        tile, kv_heads, group, head_dim = q.shape
        rows = jnp.moveaxis(q, 0, 2).reshape(kv_heads, group * tile, head_dim)
        start, end = self.visibility.interval(item.position + jnp.arange(tile, dtype=jnp.int32), item.kv_len)
        last_row = jnp.maximum(item.num_rows - 1, 0)
        first, last = self.tables.needed_columns(item.sequence, start[0], end[last_row])

        def body(step: jax.Array, softmax: _Softmax) -> _Softmax:
            pages, at = self.tables.read(item.sequence, first + step * self.tables.step)
            all_visible = jnp.all((at >= start[last_row]) & (at < end[0]))
            safe_pages = jnp.maximum(pages, 0)
            return lax.cond(
                all_visible,
                lambda: self.add(softmax, rows, safe_pages, None),
                lambda: self.add(softmax, rows, safe_pages, (at, start, end, end[last_row])),
            )

        softmax = self.empty(tile, kv_heads, group)
        steps = -(-(last - first) // self.tables.step)
        softmax = lax.fori_loop(0, steps, body, softmax)
        total = softmax.total
        out = softmax.values / jnp.where(total > 0, total, 1)[..., None]
        lse = jnp.where(total > 0, softmax.highest + jnp.log(total), -jnp.inf)
        out = jnp.moveaxis(out.reshape(kv_heads, group, tile, self.v_head_dim), 2, 0)
        return out, jnp.moveaxis(lse.reshape(kv_heads, group, tile), 2, 0)

    def empty(self, tile: int, kv_heads: int, group: int) -> _Softmax:
        """The softmax over no keys; a sink is one more logit, without a value."""
        values = jnp.zeros((kv_heads, group * tile, self.v_head_dim), jnp.float32)
        if self.sinks is None:
            return _Softmax(jnp.full(values.shape[:2], -jnp.inf), jnp.zeros(values.shape[:2]), values)
        highest = jnp.repeat(self.sinks, tile, axis=1)
        return _Softmax(highest, (highest > -jnp.inf).astype(jnp.float32), values)

    def add(self, softmax: _Softmax, rows: jax.Array, pages: jax.Array, mask: Any) -> _Softmax:
        """``softmax`` over one more step of keys. ``mask`` None: every row sees every key."""
        head_dim = rows.shape[-1]
        k = decode(gather_pages(self.k_pages, pages, head_dim), self.kv_dtype)
        v = decode(gather_pages(self.v_pages, pages, self.v_head_dim), self.kv_dtype)
        kv_heads, num_rows, _ = rows.shape
        step, _, block_size, _ = k.shape
        logits = jnp.einsum("hmd,phsd->hmps", rows, k, precision=lax.Precision.HIGHEST)
        if self.logits_soft_cap is not None:
            logits = self.logits_soft_cap * jnp.tanh(logits / self.logits_soft_cap)
        if mask is not None:
            at, start, end, last_end = mask
            tile = start.shape[0]
            visible = (at >= start[:, None, None]) & (at < end[:, None, None])
            readable = (at >= start[0]) & (at < last_end)
            group = num_rows // tile
            grouped = logits.reshape(kv_heads, group, tile, step, block_size)
            logits = jnp.where(visible, grouped, -jnp.inf).reshape(logits.shape)
            # A weight of 0 does not hide a NaN value: 0 * NaN is NaN.
            v = jnp.where(readable[:, None, :, None], v, 0)
        highest = jnp.maximum(softmax.highest, jnp.max(logits, axis=(2, 3)))
        base = jnp.where(highest == -jnp.inf, 0, highest)
        weights = jnp.exp(logits - base[..., None, None])
        decay = jnp.exp(softmax.highest - base)
        total = softmax.total * decay + jnp.sum(weights, axis=(2, 3))
        added = jnp.einsum("hmps,phsd->hmd", weights, v, precision=lax.Precision.HIGHEST)
        return _Softmax(highest, total, softmax.values * decay[..., None] + added)


def gather_pages(pages: jax.Array, ids: jax.Array, head_dim: int) -> jax.Array:
    """``pages[ids, :, :, :head_dim]``, ids valid, reading nothing else: slicing first would copy the pool."""
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    sizes = (1, *pages.shape[1:3], head_dim)
    return lax.gather(pages, ids[:, None], dimensions, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _by_head(scale: Any) -> jax.Array:
    """A scale [] or [kv_heads], to multiply [tokens, kv_heads, group, head_dim]."""
    return per_head(scale)[..., None, None]


def _select(rows: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """``new`` where ``rows`` bool[n] holds, on arrays [n, ...]."""
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
