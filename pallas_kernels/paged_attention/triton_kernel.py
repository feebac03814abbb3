"""The attention kernel in Triton: one tile of queries against the keys it sees, or against one part of them.

A tile is rows of one KV head: row r of a sequence is query ``r // group``, head ``r % group`` of the group, so that
all heads of a group share one read of K and V, and no row is padding but at the end. One loop over steps of keys with
an online softmax (base 2, float32). Keys that nobody in the tile sees are not read at all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nvidia import Gpu
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.triton_numbers import decode, multiplied, stored_columns
from pallas_kernels.triton_tiles import powers_of_2

LOG2_E = math.log2(math.e)


class Operands(NamedTuple):
    """What the kernel reads; None where the call has no such thing.

    Attributes:
        q: [tokens, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, block_size, D], as ``triton_numbers.viewed``.
        block_tables: i32[seqs, width].
        block_positions: None or i32[seqs, width].
        kv_lens: i32[seqs].
        items: None (item i is sequence i with one query, token i), or i32[items, 5]: sequence, first row of the
            tile, token of the sequence's first query, number of queries, kv_len. No queries: nothing to do.
        columns: None or, with ``block_positions``, i32[items, 2]: first and one past the last column that is seen.
        factors: f32[2, kv_heads]: of the logits, in base 2 unless there is a soft cap; of the output.
        cap: None or f32[1].
        sinks: None or f32[q_heads], base 2.
        sliding_window, chunk_size, rank: None or i32[1].
    """

    q: Any
    k_pages: Any
    v_pages: Any
    block_tables: Any
    block_positions: Any
    kv_lens: Any
    items: Any
    columns: Any
    factors: Any
    cap: Any
    sinks: Any
    sliding_window: Any
    chunk_size: Any
    rank: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Everything static.

    Attributes:
        rows: of a tile, a power of two of at least 16.
        keys: of a step, likewise.
        splits: parts that the steps of a tile are dealt to, each by a program of its own.
        fewest_steps: of a part that is not empty, if there are so many.
        one_position: whether all rows of a tile stand at one position.
        by_item: whether outputs are [items, kv_heads, rows, ...], a splits axis before it; or by token.
        group: q heads of a KV head.
        v_head_dim: logical size of V.
        causal: whether queries see no later key.
        context_size, context_interleave: of ``ContextParallel``.
        kv_dtype: logical dtype of the pages.
        gpu: that it is for.
    """

    rows: int
    keys: int
    splits: int
    fewest_steps: int
    one_position: bool
    by_item: bool
    group: int
    v_head_dim: int
    causal: bool
    context_size: int
    context_interleave: int
    kv_dtype: Any
    gpu: Gpu

    def __call__(self, given: Operands, out: Any, lse: Any) -> None:
        """Refs: what is given; out and lse (f32), by item or by token."""
        program = (pl.program_id(0), pl.program_id(1), pl.program_id(2))
        sequence, first_row, token, query_len, kv_len = self.item(given, program[0])
        num_rows = query_len * self.group

        @pl.when(first_row < num_rows)
        def _() -> None:
            row = jnp.minimum(first_row + jnp.arange(self.rows, dtype=jnp.int32), num_rows - 1)
            tile = Tile.create(self, given, program, sequence, row, token, kv_len - query_len, kv_len)
            softmax = self.over_keys(given, tile)
            self.write(given, out, lse, tile, softmax)

    def item(self, given: Operands, index: Any) -> tuple[Any, ...]:
        """(sequence, first row, token of the first query, number of queries, kv_len) of item ``index``."""
        if given.items is None:
            return index, jnp.int32(0), index, jnp.int32(1), given.kv_lens[index]
        return tuple(given.items[index, i] for i in range(5))

    def over_keys(self, given: Operands, tile: Tile) -> Softmax:
        """The softmax over this program's part of the keys: steps whose ends need masks, and the middle."""
        first, last = self.part(tile)
        softmax = self.empty(given, tile)
        if self.one_position or given.block_positions is not None:
            return self.loop(given, tile, first, last, softmax, masked=not self.one_position)
        start, end = (jnp.minimum(jnp.maximum(x, first), last) for x in tile.steps_seen_by_all)
        end = jnp.maximum(start, end)
        if given.sliding_window is not None or given.chunk_size is not None:
            softmax = self.loop(given, tile, first, start, softmax, masked=True)
        else:
            start = first
        softmax = self.loop(given, tile, start, end, softmax, masked=False)
        return self.loop(given, tile, end, last, softmax, masked=True)

    def part(self, tile: Tile) -> tuple[Any, Any]:
        """First and one past the last step, of the tile's, that are this program's."""
        first, last = tile.first_step, tile.last_step
        if self.splits == 1:
            return first, last
        steps = jnp.maximum(lax.div(last - first + (self.splits - 1), self.splits), self.fewest_steps)
        start = jnp.minimum(first + tile.split * steps, last)
        return start, jnp.minimum(start + steps, last)

    def empty(self, given: Operands, tile: Tile) -> Softmax:
        """The softmax over no keys; a sink is one more logit, without a value, for the first part to count."""
        values = [jnp.zeros((self.rows, dims.size), jnp.float32) for dims in powers_of_2(self.v_head_dim)]
        highest = jnp.full(self.rows, -jnp.inf, jnp.float32)
        if given.sinks is not None:
            counted = tile.position >= 0
            if self.splits > 1:
                counted &= tile.split == 0
            highest = jnp.where(counted, given.sinks[tile.head], highest)
        return Softmax(highest, jnp.where(highest > -jnp.inf, 1.0, 0.0), values)

    def loop(self, given: Operands, tile: Tile, first: Any, last: Any, softmax: Softmax, *, masked: bool) -> Softmax:
        """``softmax`` over steps ``first`` to ``last`` more. Not ``masked``: all rows see whatever is readable."""
        queries = [(dims, self.read_q(given, tile, dims)) for dims in powers_of_2(given.q.shape[2])]
        v_dims = powers_of_2(self.v_head_dim)

        def body(step: Any, softmax: Softmax) -> Softmax:
            keys = tile.keys(given, step)
            logits = jnp.zeros((self.rows, self.keys), jnp.float32)
            for dims, q in queries:
                logits += dot(q, self.read(given.k_pages, tile, keys, dims, q.dtype), transposed=True)
            visible = keys.readable[None, :]
            if masked:
                visible &= (keys.position >= tile.start[:, None]) & (keys.position < tile.end[:, None])
            logits = jnp.where(visible, self.finish(given, tile, logits), -jnp.inf)
            highest = jnp.maximum(softmax.highest, jnp.max(logits, axis=1))
            base = jnp.where(highest == -jnp.inf, 0.0, highest)  # exp(-inf - -inf) is NaN
            weights, decay = jnp.exp2(logits - base[:, None]), jnp.exp2(softmax.highest - base)
            total = softmax.total * decay + jnp.sum(weights, axis=1)
            weights = weights.astype(multiplied(given.q.dtype, self.kv_dtype))
            values = [
                value * decay[:, None] + dot(weights, self.read(given.v_pages, tile, keys, dims, weights.dtype))
                for dims, value in zip(v_dims, softmax.values, strict=True)
            ]
            return Softmax(highest, total, values)

        return lax.fori_loop(first, last, body, softmax)

    def finish(self, given: Operands, tile: Tile, logits: jax.Array) -> jax.Array:
        """Products of q and k as logits in base 2."""
        logits = logits * given.factors[0, tile.kv_head]
        if given.cap is None:
            return logits
        cap = given.cap[0]
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), good to 1e-7 of the cap and without Triton's slow exact tanh
        return (cap * LOG2_E) * (1 - 2 / (jnp.exp2(logits * (2 * LOG2_E / cap)) + 1))

    def read_q(self, given: Operands, tile: Tile, dims: Any) -> jax.Array:
        return given.q[tile.token, tile.head, dims].astype(multiplied(given.q.dtype, self.kv_dtype))

    def read(self, pages: Any, tile: Tile, keys: Keys, dims: Any, dtype: Any) -> jax.Array:
        """[keys, dims], zeros where not readable (a weight of 0 does not hide a NaN value: 0 * NaN is NaN)."""
        columns = stored_columns(dims, pages, self.kv_dtype)
        at = pages.at[keys.page, tile.kv_head, keys.offset, columns]
        mask = jnp.broadcast_to(keys.readable[:, None], (self.keys, columns.size))
        if self.gpu.interpret:  # which cannot load under a mask by arrays of indices
            stored = jnp.where(mask, at[...], jnp.zeros((), pages.dtype))
        else:
            stored = plgpu.load(at, mask=mask, other=jnp.zeros((), pages.dtype))
        return decode(stored, self.kv_dtype, dtype, self.gpu)

    def write(self, given: Operands, out: Any, lse: Any, tile: Tile, softmax: Softmax) -> None:
        """Normalise and store. Rows past the last one repeat it, and store the same numbers to the same place."""
        factor = given.factors[1, tile.kv_head] / jnp.where(softmax.total == 0, 1.0, softmax.total)  # a NaN stays one
        if self.by_item:
            place: tuple[Any, ...] = (tile.item, tile.kv_head, tile.row)
            place = place if self.splits == 1 else (tile.split, *place)
        else:
            place = (tile.token, tile.head)
        for dims, values in zip(powers_of_2(self.v_head_dim), softmax.values, strict=True):
            seen = jnp.where((softmax.total == 0)[:, None], 0.0, values * factor[:, None])
            out[(*place, dims)] = seen.astype(out.dtype)
        base = jnp.where(softmax.highest == -jnp.inf, 0.0, softmax.highest)
        lse[place] = base * (1 / LOG2_E) + jnp.log(softmax.total)


class Softmax(NamedTuple):
    """A softmax under way, f32: highest logit (base 2) and total weight [rows], weighted values [rows, dims] each."""

    highest: jax.Array
    total: jax.Array
    values: list[jax.Array]


class Keys(NamedTuple):
    """The keys of one step: page, offset in it, position, and whether any row of the tile sees it; all [keys]."""

    page: jax.Array
    offset: jax.Array
    position: jax.Array
    readable: jax.Array


class Tile(NamedTuple):
    """A tile of queries and what it sees.

    Attributes:
        kernel: what is static.
        context: which tokens are here.
        item, kv_head, split: i32[], of this program.
        sequence: i32[].
        row, token, head: i32[rows]: of the sequence's rows, of q, of q.
        position: i32[rows], of each row's query.
        start, end: i32[rows], the interval of positions that each row sees.
        columns: None, or first and one past the last column of the table that any row sees.
        first_seen, last_seen: i32[], the ends of what any row sees.
        all_start, all_end: i32[], the ends of what all rows see.
    """

    kernel: Kernel
    context: ContextParallel
    width: int
    block_size: int
    columns: tuple[Any, Any] | None
    item: Any
    kv_head: Any
    split: Any
    sequence: Any
    row: Any
    token: Any
    head: Any
    position: Any
    start: Any
    end: Any
    first_seen: Any
    last_seen: Any
    all_start: Any
    all_end: Any

    @classmethod
    def create(
        cls,
        kernel: Kernel,
        given: Operands,
        program: tuple[Any, Any, Any],
        sequence: Any,
        row: Any,
        token: Any,
        first_position: Any,
        kv_len: Any,
    ) -> Tile:
        """The tile of rows ``row`` of a sequence whose first query stands at ``first_position``."""
        one = lambda ref: None if ref is None else ref[0]  # noqa: E731
        rank = 0 if given.rank is None else given.rank[0]
        context = ContextParallel(kernel.context_size, rank, kernel.context_interleave)
        visibility = Visibility(kernel.causal, one(given.sliding_window), one(given.chunk_size))
        query = lax.div(row, kernel.group)
        position = first_position + query
        start, end = visibility.interval(position, kv_len)
        lowest, highest = visibility.interval(jnp.min(position), kv_len), visibility.interval(jnp.max(position), kv_len)
        return cls(
            kernel=kernel,
            context=context,
            width=given.block_tables.shape[1],
            block_size=given.k_pages.shape[2],
            columns=None if given.columns is None else (given.columns[program[0], 0], given.columns[program[0], 1]),
            item=program[0],
            kv_head=program[1],
            split=program[2],
            sequence=sequence,
            row=row,
            token=token + query,
            head=program[1] * kernel.group + lax.rem(row, kernel.group),
            position=position,
            start=start,
            end=end,
            first_seen=lowest[0],
            last_seen=highest[1],
            all_start=highest[0],
            all_end=lowest[1],
        )

    @property
    def first_step(self) -> Any:
        """The first step with a key that some row sees."""
        if self.columns is not None:
            return lax.div(self.columns[0] * self.block_size, self.kernel.keys)
        return lax.div(self.context.local_length(self.first_seen), self.kernel.keys)

    @property
    def last_step(self) -> Any:
        """One past the last such step."""
        if self.columns is not None:
            local = self.columns[1] * self.block_size
        else:
            local = jnp.minimum(self.context.local_length(self.last_seen), self.width * self.block_size)
        return lax.div(local + (self.kernel.keys - 1), self.kernel.keys)

    @property
    def steps_seen_by_all(self) -> tuple[Any, Any]:
        """First and one past the last step in which all rows see every key, by lengths alone."""
        start = lax.div(self.context.local_length(self.all_start) + (self.kernel.keys - 1), self.kernel.keys)
        return start, lax.div(self.context.local_length(self.all_end), self.kernel.keys)

    def keys(self, given: Operands, step: Any) -> Keys:
        """The keys of ``step``, through the block table."""
        local = step * self.kernel.keys + jnp.arange(self.kernel.keys, dtype=jnp.int32)
        column, offset = lax.div(local, self.block_size), lax.rem(local, self.block_size)
        held = column < self.width
        column = jnp.minimum(column, self.width - 1)
        page = given.block_tables[self.sequence, column]
        if given.block_positions is None:
            position = self.context.position(local)
        else:
            base = given.block_positions[self.sequence, column]
            position = jnp.where(base >= 0, base + self.context.position(offset), -1)
        readable = held & (page >= 0) & (page < given.k_pages.shape[0])
        readable &= (position >= self.first_seen) & (position < self.last_seen)
        return Keys(jnp.where(readable, page, 0), offset, position, readable)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """``a @ b``, or ``a @ b.T``, in float32; float32 numbers are multiplied as such, not as tf32."""
    contract = ((1,), (1 if transposed else 0,))
    # Never None, which is what jax_default_matmul_precision says.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
