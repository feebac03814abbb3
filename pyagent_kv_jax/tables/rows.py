"""Changing many rows of a block table in one dispatch. Pure functions; refused rows stay as they were."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pyagent_kv_jax.tables.ragged import are_offsets, offsets_from_lengths, rows_of_entries
from pyagent_kv_jax.tables.table_storage import Entries, Table, TableStorage


class RowBlocks(NamedTuple):
    """Blocks of several rows, flat.

    Attributes:
        ids: i32[capacity], row r's from ``row_offsets[r]`` on, its last block first; padding -1.
        row_offsets: i32[R + 1].
        ok: bool[R]; false where a row's blocks no longer fit into the capacity (it then gives none).
    """

    ids: jax.Array
    row_offsets: jax.Array
    ok: jax.Array


def append_rows(
    table: Table,
    block_ids: jax.Array,
    row_offsets: jax.Array,
    num_tokens: jax.Array,
    rows: jax.Array | None = None,
    context_parallel_size: int = 1,
) -> tuple[Table, jax.Array]:
    """Append blocks and tokens to many rows.

    Args:
        table: the table.
        block_ids: i32[F], entry b's new blocks are ``block_ids[row_offsets[b] : row_offsets[b + 1]]``; padding -1.
        row_offsets: i32[B + 1].
        num_tokens: i32[B], tokens each entry gains.
        rows: i32[B], the table row of each entry, no row twice, -1 for an entry to pass over; None: entry b is row b.
        context_parallel_size: ranks that share each block id; a column holds ``block_size`` tokens of each.

    Returns:
        The new table and ok bool[B]. Refused: a row that would outgrow its width, more tokens than its blocks hold,
        a negative count, an id below 0 or above ``table.max_block_id``, a row that is not there or named twice, a
        sparse table without room; all of them when the offsets are not offsets.
    """
    num_rows, width = table.num_rows, table.width
    capacity, num_entries = block_ids.shape[0], row_offsets.shape[0] - 1
    lengths = jnp.diff(row_offsets)
    target = jnp.arange(num_rows, dtype=jnp.int32) if rows is None else rows
    row = jnp.clip(target, 0, num_rows - 1)
    held_blocks, held_tokens = (x if rows is None else x[row] for x in (table.num_blocks, table.num_tokens))
    room = (held_blocks + lengths) * (table.config.block_size * context_parallel_size) - held_tokens

    entries = rows_of_entries(row_offsets, capacity)
    is_wrong = (block_ids < 0) | (block_ids > table.max_block_id)
    has_wrong = jnp.zeros(num_entries, bool).at[entries].max(is_wrong, mode="drop")
    ok = (held_blocks + lengths <= width) & (num_tokens >= 0) & (num_tokens <= room) & ~has_wrong
    ok &= are_offsets(row_offsets, capacity)
    if rows is not None:
        ok &= (target == row) & (_times_named(target, num_rows)[row] == 1)

    entry = jnp.minimum(entries, num_entries - 1)
    column = held_blocks[entry] + jnp.arange(capacity, dtype=jnp.int32) - row_offsets[entry]
    table, ok = table.write_blocks(Entries(row[entry], column, block_ids, entries), ok)
    more_blocks, more_tokens = jnp.where(ok, lengths, 0), jnp.where(ok, num_tokens, 0)
    if rows is not None:
        changed, nothing = jnp.where(ok, row, num_rows), jnp.zeros(num_rows, jnp.int32)
        more_blocks, more_tokens = (nothing.at[changed].add(x, mode="drop") for x in (more_blocks, more_tokens))
        ok |= (target == -1) & (lengths == 0) & (num_tokens == 0)
    new = dataclasses.replace(
        table, num_blocks=table.num_blocks + more_blocks, num_tokens=table.num_tokens + more_tokens
    )
    return new, ok


def get_blocks(table: TableStorage, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Block ids at ``rows`` and ``columns`` i32[n]; -1 where there is none."""
    row, column = jnp.clip(rows, 0, table.num_rows - 1), jnp.clip(columns, 0, table.width - 1)
    return jnp.where((row == rows) & (column == columns), table.read_blocks(row, column), -1)


def set_blocks(table: Table, rows: jax.Array, columns: jax.Array, block_ids: jax.Array) -> tuple[Table, jax.Array]:
    """Put blocks into any columns, whether or not there is one; all of them or none.

    A row then holds all columns up to the last one that was set, as far as blocks and tokens are counted: columns
    before it that were never set are -1, and their tokens have no slot.

    Args:
        table: the table.
        rows: i32[n]; -1 is padding.
        columns: i32[n], no column of a row twice.
        block_ids: i32[n].

    Returns:
        The new table and ok bool[]: false, and nothing changed, for a row or column that is not there or named twice,
        an id below 0 or above ``table.max_block_id``, or a sparse table without room.
    """
    num_rows, last = table.num_rows, jnp.iinfo(jnp.int32).max
    padding = rows == -1
    order = jnp.lexsort((columns, jnp.where(padding, last, rows)))  # a row's columns side by side, padding last
    row, column, ids, padding = (x[order] for x in (rows, columns, block_ids, padding))
    right = (row >= 0) & (row < num_rows) & (column >= 0) & (column < table.width)
    right &= (ids >= 0) & (ids <= table.max_block_id)
    twice = (row[1:] == row[:-1]) & (column[1:] == column[:-1]) & ~padding[1:]
    ok = jnp.all(right | padding) & ~jnp.any(twice)
    table, written = table.write_blocks(Entries(row, column, ids, padding.astype(jnp.int32)), ok[None])
    changed = jnp.where(written[0] & ~padding, row, num_rows)
    tokens = (column + 1) * table.config.block_size
    new = dataclasses.replace(
        table,
        num_blocks=table.num_blocks.at[changed].max(column + 1, mode="drop"),
        num_tokens=table.num_tokens.at[changed].max(tokens, mode="drop"),
    )
    return new, written[0]


def rows_blocks(table: TableStorage, mask: jax.Array, capacity: int) -> RowBlocks:
    """The blocks of the rows in ``mask`` bool[R], each row's last block first, as ``BlockPool.free`` wants them."""
    lengths = jnp.where(mask, table.num_blocks, 0)
    ok = jnp.cumsum(lengths, dtype=jnp.int32) <= capacity
    ok |= lengths == 0
    row_offsets = offsets_from_lengths(jnp.where(ok, lengths, 0))
    entries = rows_of_entries(row_offsets, capacity)
    real = entries < lengths.shape[0]
    row = jnp.where(real, entries, 0)
    column = row_offsets[row + 1] - 1 - jnp.arange(capacity, dtype=jnp.int32)
    ids = table.read_blocks(row, jnp.clip(column, 0, table.width - 1))
    return RowBlocks(jnp.where(real, ids, -1), row_offsets, ok)


def clear_rows(table: Table, mask: jax.Array) -> Table:
    """Empty the rows in ``mask`` bool[R]. The cost follows the rows cleared (sparse: the nodes), not rows x width."""
    return dataclasses.replace(
        table.empty_rows(mask),
        num_blocks=jnp.where(mask, 0, table.num_blocks),
        num_tokens=jnp.where(mask, 0, table.num_tokens),
    )


def release_rows(table: Table, mask: jax.Array, capacity: int) -> tuple[Table, RowBlocks]:
    """``rows_blocks``, then ``clear_rows`` of the rows whose blocks fit into ``capacity``."""
    released = rows_blocks(table, mask, capacity)
    return clear_rows(table.after_reading(released.ids), mask & released.ok), released


def reorder_rows(table: Table, dst: jax.Array, src: jax.Array) -> tuple[Table, jax.Array]:
    """Row ``dst[i]`` becomes what row ``src[i]`` was; all reads come before all writes.

    Args:
        table: the table.
        dst: i32[M], rows, no row twice; -1 (in both) is padding.
        src: i32[M], the same rows in another order, so that no row is lost or doubled.

    Returns:
        The new table and ok bool[]: false, and nothing changed, when ``dst`` and ``src`` are not that.
    """
    num_rows = table.num_rows
    named_dst, named_src = _times_named(dst, num_rows), _times_named(src, num_rows)
    padding = (dst == -1) & (src == -1)
    inside = (dst >= 0) & (dst < num_rows) & (src >= 0) & (src < num_rows)
    ok = jnp.all(named_dst == named_src) & jnp.all(named_dst <= 1) & jnp.all(inside | padding)
    target = jnp.where(ok & inside, dst, num_rows)
    source = jnp.clip(src, 0, num_rows - 1)
    moved = dataclasses.replace(
        table.exchange_rows(target, source),
        num_blocks=table.num_blocks.at[target].set(table.num_blocks[source], mode="drop"),
        num_tokens=table.num_tokens.at[target].set(table.num_tokens[source], mode="drop"),
    )
    return moved, ok


def _times_named(rows: jax.Array, num_rows: int) -> jax.Array:
    """i32[R]: how often each row of the table stands in ``rows``; anything else is passed over."""
    inside = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    return jnp.zeros(num_rows, jnp.int32).at[inside].add(1, mode="drop")
