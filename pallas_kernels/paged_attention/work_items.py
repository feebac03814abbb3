"""What there is to do: one item per tile of queries of one sequence, no more items than there are.

The number of items is known only at run time, its bound at trace time: a sequence of n queries makes ``ceil(n
/ tile)`` items, so a loop over them costs what the real lengths cost, whatever the padding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checking import check
from pallas_kernels.paged_attention.context_parallel import ContextParallel


class Item(NamedTuple):
    """One tile of queries of one sequence; every field i32[].

    Attributes:
        sequence: which one.
        token: row of q where the tile starts.
        num_rows: rows of the tile that belong to the sequence; 0 when there is no such item.
        position: position in the sequence of the tile's first query.
        kv_len: tokens of the sequence.
    """

    sequence: jax.Array
    token: jax.Array
    num_rows: jax.Array
    position: jax.Array
    kv_len: jax.Array


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Where each sequence's queries start (i32[seqs]), how many they are, and how long it is with them."""

    start: jax.Array
    query_len: jax.Array
    kv_len: jax.Array

    @classmethod
    def create(cls, query_start_loc: jax.Array | None, kv_lens: jax.Array, tokens: int) -> Sequences:
        """From the arguments of ``paged_attention``; ``query_start_loc`` None: one query a sequence."""
        if query_start_loc is None:
            start = jnp.arange(tokens, dtype=jnp.int32)
            return cls(start, jnp.ones_like(start), kv_lens)
        bounds = jnp.clip(query_start_loc, 0, tokens)
        return cls(bounds[:-1], jnp.maximum(bounds[1:] - bounds[:-1], 0), kv_lens)

    def items(self, tile: int, *, fewest: int, most: int | None = None) -> Items:
        """Items of ``tile`` queries, of those sequences that have ``fewest`` to ``most`` queries."""
        mine = self.query_len >= fewest
        if most is not None:
            mine &= self.query_len <= most
        counts = jnp.where(mine, -(-self.query_len // tile), 0)
        return Items(self, tile, jnp.cumsum(counts, dtype=jnp.int32))


@dataclasses.dataclass(frozen=True)
class Items:
    """The list of items, by the running count ``ends`` i32[seqs] of them."""

    sequences: Sequences
    tile: int
    ends: jax.Array

    @property
    def total(self) -> jax.Array:
        """How many items there are, i32[]."""
        return self.ends[-1]

    def get(self, index: jax.Array) -> Item:
        """The ``index``-th item."""
        of = self.sequences
        sequence = jnp.sum(self.ends <= index, dtype=jnp.int32)
        first = jnp.where(sequence > 0, self.ends[sequence - 1], 0)
        done = (index - first) * self.tile
        query_len, kv_len = of.query_len[sequence], of.kv_len[sequence]
        num_rows = jnp.clip(query_len - done, 0, self.tile)
        return Item(sequence, of.start[sequence] + done, num_rows, kv_len - query_len + done, kv_len)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The block tables, padded so that a step may run past their last column.

    Attributes:
        blocks: i32[seqs, width + step], -1 in holes and padding.
        positions: None, or i32[seqs, width + step]: position of each column's first token, -1: unused column.
        width: columns before padding.
        step: columns read at a time.
        block_size: tokens of this rank in a block.
        context: which tokens those are.
    """

    blocks: jax.Array
    positions: jax.Array | None
    width: int
    step: int
    block_size: int
    context: ContextParallel

    @classmethod
    def create(
        cls,
        block_tables: jax.Array,
        block_positions: jax.Array | None,
        *,
        step: int,
        num_pages: int,
        block_size: int,
        context: ContextParallel,
    ) -> Tables:
        """From the arguments of ``paged_attention``. Ids outside the pool become holes."""
        valid = (block_tables >= 0) & (block_tables < num_pages)
        pad = ((0, 0), (0, step))
        blocks = jnp.pad(jnp.where(valid, block_tables, -1), pad, constant_values=-1)
        if block_positions is not None:
            block_positions = jnp.pad(block_positions, pad, constant_values=-1)
        return cls(blocks, block_positions, block_tables.shape[1], step, block_size, context)

    def report(self, kv_lens: jax.Array) -> None:
        """In checking mode, an error unless every sequence fits its row of the table."""
        if self.positions is None:
            report_room(kv_lens, self.width, self.block_size, self.context)

    def needed_columns(self, sequence: jax.Array, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and one past the last column of ``sequence`` in [start, end); equal if none is."""
        if self.positions is None:
            low, high = self.context.local_length(start), self.context.local_length(end)
            first, last = low // self.block_size, -(-high // self.block_size)
            return first, jnp.where(high > low, jnp.minimum(last, self.width), first)
        at, blocks = self.positions[sequence], self.blocks[sequence]
        covered = self.block_size * self.context.size
        needed = (blocks >= 0) & (at >= 0) & (at < end) & (at > start - covered)
        column = jnp.arange(at.shape[0], dtype=jnp.int32)
        first = jnp.min(jnp.where(needed, column, at.shape[0]))
        last = jnp.max(jnp.where(needed, column + 1, 0))
        return first, jnp.maximum(last, first)

    def read(self, sequence: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pages i32[step] from ``column`` on, and positions i32[step, block_size] in them; -1: nothing."""
        pages = lax.dynamic_slice(self.blocks, (sequence, column), (1, self.step))[0]
        offset = jnp.arange(self.block_size, dtype=jnp.int32)
        if self.positions is None:
            columns = column + jnp.arange(self.step, dtype=jnp.int32)
            at = self.context.position(columns[:, None] * self.block_size + offset)
        else:
            base = lax.dynamic_slice(self.positions, (sequence, column), (1, self.step))[0][:, None]
            at = jnp.where(base >= 0, base + self.context.position(offset), -1)
        return pages, jnp.where(pages[:, None] >= 0, at, -1)


def report_room(kv_lens: jax.Array, width: int, block_size: int, context: ContextParallel) -> None:
    """In checking mode, an error unless every length fits a row of ``width`` columns."""
    most = width * block_size * context.size
    message = f"kv_lens: got up to {{longest}}, want at most the {most} tokens of a row of block_tables"
    longest = jnp.max(kv_lens, initial=0)
    check(longest <= most, message, longest=longest)
