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

from pallas_kernels.checking import check
from pallas_kernels.number_format import decode, per_head
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.online_softmax import OnlineSoftmax
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Item, Items, Sequences, Tables

# Measured on CPUs: what a step gathers should stay in a core's own cache until it is used.
TOKENS_A_STEP = 256
LARGEST_TILE = 64
# Sequences of this many queries or fewer make one tile; beyond, single queries and long ones go separately.
SMALL_TILE = 8


@partial(jax.jit, static_argnames=("causal", "kv_dtype", "v_head_dim", "return_lse", "max_query_len", "max_kv_len"))
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
    visibility = Visibility(causal, sliding_window, chunk_size)
    report_out_of_range("block_tables", block_tables, num_pages)
    report_lengths(kv_lens, query_start_loc, tokens)
    visibility.report()
    width = min(block_tables.shape[1], -(-max_kv_len // block_size) if max_kv_len else block_tables.shape[1])
    tables = Tables.create(
        block_tables,
        block_positions,
        step=max(min(TOKENS_A_STEP // block_size, width), 1),
        num_pages=num_pages,
        block_size=block_size,
        context=context_parallel,
    )
    tables.report(kv_lens)
    by_group = (kv_heads, q_heads // kv_heads)
    attention = _Attention(
        k_pages=k_pages,
        v_pages=v_pages,
        tables=tables,
        visibility=visibility,
        logits_soft_cap=logits_soft_cap,
        sinks=None if sinks is None else sinks.astype(jnp.float32).reshape(by_group),
        kv_dtype=kv_dtype,
        v_head_dim=v_head_dim,
    )
    # Scales of K and of the logits are one factor of q; the scale of V is one factor of the output.
    q_scale = scale if k_scale is None else scale * per_head(k_scale)
    scaled = q.astype(jnp.float32).reshape(tokens, *by_group, head_dim) * _by_head(q_scale)
    sequences = Sequences.create(query_start_loc, kv_lens, tokens)
    longest = 1 if query_start_loc is None else min(max_query_len or tokens, tokens)
    out, lse = attention.over_tokens(scaled, sequences, longest)
    if v_scale is not None:
        out = out * _by_head(v_scale)
    out = out.reshape(tokens, q_heads, v_head_dim).astype(q.dtype)
    return (out, lse.reshape(tokens, q_heads)) if return_lse else out


def report_lengths(kv_lens: jax.Array, query_start_loc: jax.Array | None, tokens: int) -> None:
    """In checking mode, an error unless lengths are no less than 0 and queries lie in order within the tokens."""
    check(jnp.all(kv_lens >= 0), "kv_lens: got a negative length, want 0 or more")
    if query_start_loc is not None:
        rises = jnp.all(query_start_loc[1:] >= query_start_loc[:-1])
        inside = (query_start_loc[0] == 0) & (query_start_loc[-1] <= tokens)
        message = f"query_start_loc: got {{loc}}, want a sequence that never falls, from 0 to {tokens} at most"
        check(rises & inside, message, loc=query_start_loc)


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

        Sequences with one query and with many (decode and prefill of a mixed batch) are served by two loops,
        so that a single query does not pay for a whole tile.
        """
        tokens = q.shape[0]
        tile = longest if longest <= SMALL_TILE else min(LARGEST_TILE, _next_power_of_2(longest))
        q = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))  # the last tile may reach past the last token
        out = jnp.zeros((*q.shape[:3], self.v_head_dim), jnp.float32)
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        if tokens == 0 or sequences.kv_len.size == 0:
            return out[:tokens], lse[:tokens]
        if longest <= SMALL_TILE:
            lists = [sequences.items(tile, fewest=1)]
        else:
            lists = [sequences.items(1, fewest=1, most=1), sequences.items(tile, fewest=2)]
        for items in lists:
            out, lse = self.over_items(q, items, out, lse)
        return out[:tokens], lse[:tokens]

    def over_items(self, q: jax.Array, items: Items, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
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

        def body(step: jax.Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
            pages, at = self.tables.read(item.sequence, first + step * self.tables.step)
            all_see_all = jnp.all((at >= start[last_row]) & (at < end[0]))
            read = partial(self.logits_and_values, rows, jnp.maximum(pages, 0))

            def at_an_edge() -> OnlineSoftmax:
                logits, v = read()
                flat = at.reshape(-1)
                visible = (flat >= start[:, None]) & (flat < end[:, None])
                # A weight of 0 does not hide a NaN value (0 * NaN is NaN): values nobody sees are 0
                # themselves.
                v = jnp.where(((flat >= start[0]) & (flat < end[last_row]))[:, None], v, 0)
                grouped = logits.reshape(kv_heads, group, tile, -1)
                return softmax.add(jnp.where(visible, grouped, -jnp.inf).reshape(logits.shape), v)

            return lax.cond(all_see_all, lambda: softmax.add(*read()), at_an_edge)

        sinks = None if self.sinks is None else jnp.repeat(self.sinks, tile, axis=1)
        softmax = OnlineSoftmax.start(kv_heads, group * tile, self.v_head_dim, sinks)
        softmax = lax.fori_loop(0, -(-(last - first) // self.tables.step), body, softmax)
        out, lse = softmax.finish()
        out = jnp.moveaxis(out.reshape(kv_heads, group, tile, self.v_head_dim), 2, 0)
        return out, jnp.moveaxis(lse.reshape(kv_heads, group, tile), 2, 0)

    def logits_and_values(self, rows: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All keys and values of ``pages`` i32[step]: (logits [kv_heads, rows, n], v [kv_heads, n, v_head_dim])."""
        kv_heads, num_rows, head_dim = rows.shape
        k = self.gather(self.k_pages, pages, head_dim)
        v = self.gather(self.v_pages, pages, self.v_head_dim)
        # Keys on the left: with few rows this product is 2.5 times faster on CPU than rows on the left. As a
        # transpose of four dimensions, what follows is not folded back into the product.
        left = lax.dot_general(k, rows, (((3,), (2,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)
        logits = jnp.transpose(left, (0, 3, 1, 2)).reshape(kv_heads, num_rows, -1)
        if self.logits_soft_cap is not None:
            logits = self.logits_soft_cap * jnp.tanh(logits / self.logits_soft_cap)
        return logits, v.reshape(kv_heads, -1, self.v_head_dim)

    def gather(self, pages: jax.Array, ids: jax.Array, head_dim: int) -> jax.Array:
        """f32[kv_heads, n, block_size, head_dim] of pages ``ids`` i32[n], valid all.

        One gather brings the heads to the front and leaves padding of head_dim unread. Slicing or transposing
        the pages themselves would copy the pool.
        """
        dimensions = lax.GatherDimensionNumbers(offset_dims=(0, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0,))
        sizes = (1, *pages.shape[1:3], head_dim)
        mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return decode(lax.gather(pages, ids[:, None], dimensions, sizes, mode=mode), self.kv_dtype)


def _by_head(scale: Any) -> jax.Array:
    """A scale [] or [kv_heads], to multiply [tokens, kv_heads, group, head_dim]."""
    return per_head(scale)[..., None, None]


def _select(rows: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """``new`` where ``rows`` bool[n] holds, on arrays [n, ...]."""
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
