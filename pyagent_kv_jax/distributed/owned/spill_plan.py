"""Whose blocks each row gets, when blocks live on several devices: a plan that every device computes alike."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.pool.admission import serve
from pyagent_kv_jax.tables.ragged import offsets_from_lengths, rows_of_entries


class SpillPlan(NamedTuple):
    """Which device gives each of up to F blocks, the rows' blocks flat one row after another.

    Attributes:
        owners: i32[F], the device that gives the block; D, of D devices, for padding.
        places: i32[F], which of the blocks that its device gives it is.
        row_offsets: i32[B + 1].
        ok: bool[B]; a refused row gets nothing.
        taken: i32[D], blocks that each device gives.
    """

    owners: jax.Array
    places: jax.Array
    row_offsets: jax.Array
    ok: jax.Array
    taken: jax.Array


def plan_spill(
    num_free: jax.Array, counts: jax.Array, devices: jax.Array, valid: jax.Array, capacity: int
) -> SpillPlan:
    """Share out the free blocks of D devices among B rows. A pure function of numbers all devices have.

    1. Who is served does not depend on where blocks are: each row whole or not at all, in their order; once one does
       not fit into the free blocks of all devices (or into ``capacity``), later ones that want blocks are refused too.
    2. Served rows get the blocks of their own device, in their order, as far as there are any.
    3. What is still missing comes, in the order of the rows, from the device that has most blocks left after 2 (of
       equals the lowest), all of them, then from the next: a row that spills is spread over few devices.

    A device gives its blocks in its pool's own order.

    Args:
        num_free: i32[D].
        counts: i32[B], blocks wanted.
        devices: i32[B], each row's own device; -1: none, so that all of its blocks come by 3.
        valid: bool[B]; other rows are refused by themselves and stop nobody.
        capacity: static, F.
    """
    num_devices = num_free.shape[0]
    length = jnp.clip(counts, 0, capacity + 1)  # more can't be given; sums stay within int32
    ok, row_offsets = serve(length, None, valid, jnp.sum(num_free), capacity, None)
    length = jnp.where(ok, length, 0)

    is_own = devices[:, None] == jnp.arange(num_devices)
    wants = jnp.where(is_own, length[:, None], 0)  # [B, D]
    before = jnp.cumsum(wants, axis=0, dtype=jnp.int32) - wants
    near = jnp.clip(jnp.sum(jnp.where(is_own, num_free - before, 0), axis=1), 0, length)
    left = num_free - jnp.minimum(num_free, jnp.sum(wants, axis=0))
    by_most_left = jnp.argsort(-left, stable=True)
    left_ends = jnp.cumsum(left[by_most_left])

    row = rows_of_entries(row_offsets, capacity)
    real = row < len(counts)
    row = jnp.minimum(row, len(counts) - 1)
    within = jnp.arange(capacity, dtype=jnp.int32) - row_offsets[row]
    missing = offsets_from_lengths(length - near)[row] + within - near[row]
    elsewhere = by_most_left[jnp.minimum(jnp.searchsorted(left_ends, missing, side="right"), num_devices - 1)]
    owners = jnp.where(real, jnp.where(within < near[row], devices[row], elsewhere), num_devices)

    given = jnp.cumsum(owners[:, None] == jnp.arange(num_devices), axis=0, dtype=jnp.int32)  # [F, D]
    places = jnp.take_along_axis(given, jnp.minimum(owners, num_devices - 1)[:, None], axis=1)[:, 0] - 1
    taken = given[-1] if capacity else jnp.zeros_like(num_free)
    return SpillPlan(owners.astype(jnp.int32), places, row_offsets, ok, taken)


def spill_of_row(num_free: np.ndarray, count: int, device: int) -> list[tuple[int, int]]:
    """``plan_spill`` of one row, on the host: (device, blocks that it gives), in the order of the row's blocks.

    Args:
        num_free: i64[D], at least ``count`` in all.
        count: blocks wanted.
        device: the row's own; -1: none.
    """
    own = np.arange(len(num_free)) == device
    order = np.lexsort((-num_free, ~own))  # stable: of equals the lowest
    ends = np.minimum(np.cumsum(num_free[order]), count)
    gives = np.diff(ends, prepend=0)
    return [(int(order[i]), int(gives[i])) for i in np.flatnonzero(gives)]
