"""Who gets blocks: rows served in order, each all or nothing. Pure functions on arrays."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pyagent_kv_jax.arguments import static_count
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.tables.in_place import after
from pyagent_kv_jax.tables.ragged import are_offsets, offsets_from_lengths, rows_of_entries


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "row_offsets", "ok", "evicted"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Admission:
    """What ``BlockPool.admit`` gave to R rows, ragged and flat.

    Attributes:
        ids: i32[capacity]; row r's blocks, its hits and then its new ones, are
            ``ids[row_offsets[r] : row_offsets[r + 1]]``; padding -1.
        row_offsets: i32[R + 1].
        ok: bool[R]; a refused row got nothing.
        evicted: bool[capacity], new blocks whose cached content was given up.
    """

    ids: jax.Array
    row_offsets: jax.Array
    ok: jax.Array
    evicted: jax.Array


class Hits(NamedTuple):
    """The cached blocks that rows ask for, H entries, against the pool as it is.

    Attributes:
        block: i32[H], the block; N for padding and for hits that cannot be.
        row: i32[H], who asks; R for padding.
        lengths: i32[R], hits of each row.
        revives: bool[H], this entry is the first, in the order of service, to name a free block.
        row_ok: bool[R], every hit of the row is a block in use or one with cached content.
    """

    block: jax.Array
    row: jax.Array
    lengths: jax.Array
    revives: jax.Array
    row_ok: jax.Array


def checked_capacity(capacity: Any, rows: int, num_hits: int = 0) -> int:
    """``capacity`` as an int, small enough for sums over ``rows`` rows and their hits to fit int32.

    Raises:
        InvalidArgumentError: it is no static count, or larger.
    """
    size = static_count("capacity", capacity)
    if rows * (size + 1) + num_hits >= 2**31:
        raise InvalidArgumentError(f"capacity: got {size} for {rows} rows, want (capacity + 1) * rows < 2**31")
    return size


def look_up_hits(
    ref_counts: jax.Array,
    cached: jax.Array,
    hits: jax.Array,
    hit_offsets: jax.Array,
    row_valid: jax.Array,
    order: jax.Array | None,
) -> tuple[Hits, jax.Array, jax.Array]:
    """Check the hits and find out which entries revive a block, without sorting.

    Free blocks have a count of 0, so the counts serve as scratch: each entry that names a free block bids its place
    in the order of service (less a constant, so that bids are negative), the lowest bid stays, and whoever finds its
    own has won.

    Returns:
        The hits, and ``ref_counts`` and ``cached`` as they were, in the form that later updates leave in place.
    """
    num_blocks, num_rows, num_hits = ref_counts.shape[0], row_valid.shape[0], hits.shape[0]
    lengths = jnp.diff(hit_offsets)
    row = rows_of_entries(hit_offsets, num_hits)
    real = row < num_rows
    inside = real & (hits >= 0) & (hits < num_blocks)
    block = jnp.where(inside, hits, num_blocks)
    is_free = inside & (ref_counts.at[block].get(mode="fill", fill_value=1) == 0)
    usable = inside & (~is_free | cached.at[block].get(mode="fill", fill_value=False))
    row_ok = ~jnp.zeros(num_rows, bool).at[row].max(real & ~usable, mode="drop")
    row_ok &= are_offsets(hit_offsets, num_hits)

    bids = is_free & (row_valid & row_ok)[jnp.minimum(row, num_rows - 1)]
    bid = _places(hit_offsets, row, order) - num_hits
    ref_counts = ref_counts.at[jnp.where(bids, block, num_blocks)].min(bid, mode="drop")
    lowest = ref_counts.at[block].get(mode="fill", fill_value=0)
    has_bid = bids & (lowest < 0)
    ref_counts = ref_counts.at[jnp.where(has_bid, block, num_blocks)].set(0, mode="drop")
    return Hits(block, row, lengths, has_bid & (lowest == bid), row_ok), ref_counts, after(cached, usable)


def _places(offsets: jax.Array, row: jax.Array, order: jax.Array | None) -> jax.Array:
    """i32[H]: the place of each entry when the rows stand in the order of service."""
    entry = jnp.arange(row.shape[0], dtype=jnp.int32)
    if order is None:
        return entry
    num_rows = offsets.shape[0] - 1
    starts = in_rows(offsets_from_lengths(jnp.diff(offsets)[order])[:-1], order)
    row = jnp.minimum(row, num_rows - 1)
    return jnp.clip(starts[row] + entry - offsets[row], 0, row.shape[0] - 1)


def in_rows(served: jax.Array, order: jax.Array | None) -> jax.Array:
    """[R] by place in the order of service -> [R] by row."""
    return served if order is None else jnp.zeros_like(served).at[order].set(served, mode="drop")


def serve(
    length: jax.Array,
    cost: jax.Array | None,
    valid: jax.Array,
    num_free: jax.Array,
    capacity: int,
    order: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The rows that get what they want.

    Args:
        length: i32[R], ids a row gets.
        cost: i32[R], free blocks a row uses up, if no row before it is refused; None: as many as it gets ids.
        valid: bool[R]; other rows are refused by themselves and stop nobody.
        num_free: i32[].
        capacity: ids that can be given in all.
        order: i32[R], rows in the order of service.

    Returns:
        (ok bool[R], offsets i32[R + 1] of the ids given, with the rows in the order of service).
    """
    wants = length > 0
    ends = _ends(length, valid, order)
    spent = ends if cost is None else _ends(cost, valid, order)
    # Both only grow, so once a row does not fit, no later one that wants blocks does.
    fits = (spent <= num_free) & (ends <= capacity)
    given = jnp.max(jnp.where(fits, ends, 0), initial=0)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.minimum(ends, given)])
    return valid & (in_rows(fits, order) | ~wants), offsets


def _ends(length: jax.Array, valid: jax.Array, order: jax.Array | None) -> jax.Array:
    length = jnp.where(valid, length, 0)
    return jnp.cumsum(length if order is None else length[order], dtype=jnp.int32)


def is_order(order: jax.Array, num_rows: int) -> jax.Array:
    """bool[]: whether ``order`` i32[R] names each row once."""
    named = jnp.zeros(num_rows, jnp.int32).at[jnp.where(order < 0, num_rows, order)].add(1, mode="drop")
    return jnp.all(named == 1)


def lay_out(
    new_ids: jax.Array,
    num_uncached: jax.Array,
    counts: jax.Array,
    order: jax.Array | None,
    hits: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hits and new blocks of each row together, where they do not come in the order of the rows as it is.

    Args:
        new_ids: i32[capacity], in the order of service; padding -1.
        num_uncached: i32[], how many of ``new_ids`` had no cached content.
        counts: i32[R], new blocks of each row.
        order: i32[R], rows in the order of service.
        hits: ids i32[H], offsets i32[R + 1], and how many each row gets of them i32[R] (refused rows: 0).

    Returns:
        (ids i32[capacity], row_offsets i32[R + 1], evicted bool[capacity]).
    """
    capacity, num_rows = new_ids.shape[0], counts.shape[0]
    num_hits = jnp.zeros_like(counts) if hits is None else hits[2]
    row_offsets = offsets_from_lengths(counts + num_hits)
    row = rows_of_entries(row_offsets, capacity)
    real = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    served = counts if order is None else counts[order]
    first_new = in_rows(offsets_from_lengths(served)[:-1], order)
    within = jnp.arange(capacity, dtype=jnp.int32) - row_offsets[row]
    is_new = real & (within >= num_hits[row])
    place = first_new[row] + within - num_hits[row]
    ids = jnp.where(is_new, new_ids[jnp.clip(place, 0, capacity - 1)], -1)
    if hits is not None:
        hit = jnp.clip(hits[1][row] + within, 0, hits[0].shape[0] - 1)
        ids = jnp.where(real & ~is_new, hits[0][hit], ids)
    return ids, row_offsets, is_new & (place >= num_uncached)
