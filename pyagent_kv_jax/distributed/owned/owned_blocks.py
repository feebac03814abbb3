"""Giving out and taking back blocks that live on the devices of a mesh axis: what each device does, in ``shard_map``.

Device d of D owns blocks ``d * n`` to ``d * n + n - 1``, n a device: it keeps their pool and stores their pages. The
table is the same on all devices, and stays the same: every device changes it by the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pyagent_kv_jax.distributed.owned.spill_plan import plan_spill
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable, append_rows, clear_rows, rows_blocks


class GivenBlocks(NamedTuple):
    """New blocks of B rows, ragged and flat.

    Attributes:
        ids: i32[F], row b's are ``ids[row_offsets[b] : row_offsets[b + 1]]``; padding -1.
        row_offsets: i32[B + 1].
        ok: bool[B]; a refused row got nothing, and is as it was.
    """

    ids: jax.Array
    row_offsets: jax.Array
    ok: jax.Array


def local_ids(ids: jax.Array, device: jax.Array, per_device: int) -> jax.Array:
    """Ids (of blocks, or of slots with ``per_device`` slots) i32[...] as the device's own counts them; else -1."""
    local = ids - device * per_device
    return jnp.where((ids >= 0) & (local >= 0) & (local < per_device), local, -1)


def allocate_owned(
    table: BlockTable,
    pool: BlockPool,
    rows: jax.Array,
    counts: jax.Array,
    num_tokens: jax.Array,
    devices: jax.Array,
    *,
    axis_name: Hashable,
    capacity: int,
) -> tuple[BlockTable, BlockPool, GivenBlocks]:
    """Append ``counts`` new blocks and ``num_tokens`` tokens to rows, by the rule of ``plan_spill``.

    Two collectives: an all-gather of D numbers, the free blocks of each device, and an all-reduce of ``capacity``, the
    ids.

    Args:
        table: the same on all devices of the axis.
        pool: this device's blocks.
        rows: i32[B], rows of the table; -1 is padding.
        counts: i32[B], new blocks.
        num_tokens: i32[B], tokens gained.
        devices: i32[B], the device each row prefers; -1: none.
        axis_name: the mesh axis.
        capacity: static; the most blocks given in all.

    Returns:
        (table, pool, given). Refused by itself: a row that is not there or named twice, would outgrow its width, or
        gains more tokens than its blocks hold; a negative count; a device that is not there.
    """
    rank, size = lax.axis_index(axis_name), lax.axis_size(axis_name)
    padding = rows == -1
    counts, num_tokens = (jnp.where(padding, 0, x) for x in (counts, num_tokens))
    possible = _fits_row(table, rows, counts, num_tokens) & (devices >= -1) & (devices < size)
    num_free = lax.all_gather(pool.num_free, axis_name)
    plan = plan_spill(num_free, counts, devices, possible | padding, capacity)
    pool, mine = pool.allocate(plan.taken[rank][None], capacity=capacity)
    ids = jnp.where(plan.owners == rank, mine.ids[plan.places] + rank * pool.num_blocks, 0)
    ids = jnp.where(plan.owners < size, lax.psum(ids, axis_name), -1)
    table, _ = append_rows(table, ids, plan.row_offsets, jnp.where(plan.ok, num_tokens, 0), rows)
    return table, pool, GivenBlocks(ids, plan.row_offsets, plan.ok)


def free_owned(
    table: BlockTable, pool: BlockPool, rows: jax.Array, *, axis_name: Hashable
) -> tuple[BlockTable, BlockPool, jax.Array]:
    """Empty ``rows`` i32[B] (padding -1) and free their blocks, each on its owner. No collective.

    Returns:
        (table, pool, ok bool[B]). Refused by itself: a row that is not there, is named twice, or holds nothing.
    """
    row, once = _named_once(table, rows)
    ok = once & (table.num_blocks[row] > 0)
    mask = jnp.zeros(table.num_rows, bool).at[jnp.where(ok, row, table.num_rows)].set(True, mode="drop")
    released = rows_blocks(table, mask, len(rows) * table.width)
    local = local_ids(released.ids, lax.axis_index(axis_name), pool.num_blocks)
    pool, _ = pool.free(local)
    return clear_rows(table.after_reading(released.ids), mask), pool, ok | (rows == -1)


def _fits_row(table: BlockTable, rows: jax.Array, counts: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """bool[B]: whether each row is there, named once, and can hold so much more."""
    row, once = _named_once(table, rows)
    columns = table.num_blocks[row] + jnp.clip(counts, 0, table.width + 1)
    room = columns * table.config.block_size - table.num_tokens[row]
    fits = (counts >= 0) & (columns <= table.width) & (num_tokens >= 0) & (num_tokens <= room)
    return once & fits


def _named_once(table: BlockTable, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a row that is there i32[B], whether it is the one named bool[B], and named once)."""
    row = jnp.clip(rows, 0, table.num_rows - 1)
    inside = rows == row
    times = jnp.zeros(table.num_rows, jnp.int32).at[jnp.where(inside, row, table.num_rows)].add(1, mode="drop")
    return row, inside & (times[row] == 1)
