"""The two queues of free blocks, both rings in one array ``queue`` i32[4N].

``queue[:N]`` holds free blocks with no cached content, first freed, first taken. It never has holes.

``queue[N:]`` holds free blocks with cached content, least recently freed first. A block that leaves from the middle
(revived, or its content forgotten) leaves a hole, -1. From its head on the ring is

    [ compacted ][ gap ][ unswept ]

Each step that makes holes (but for ``remove``) or joins blocks also sweeps a few entries: live ones move from the
front of ``unswept`` to the end of ``compacted``, and the gap grows by the holes between them. When ``unswept`` is used
up, the tail retreats over the gap and the next pass begins. Sweeping four entries for each one that joins or leaves
keeps the ring within 2N entries: a pass over E entries ends before E / 3 more have joined, and leaves at most
N + E / 3. So no step ever compacts the ring as a whole.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from pyagent_kv_jax.tables.in_place import after

_SWEPT_PER_CHANGE = 4
_WINDOW = 128  # entries swept or scanned at a time


class Counters(NamedTuple):
    """Where the two rings begin and how long they are; i32[] each, stored together as ``counters`` i32[7]."""

    uncached_head: jax.Array
    num_uncached: jax.Array
    cached_head: jax.Array
    compacted: jax.Array
    gap: jax.Array
    unswept: jax.Array
    num_cached: jax.Array  # entries of the cached ring that are not holes

    @classmethod
    def of(cls, counters: jax.Array) -> Self:
        """From i32[7]."""
        return cls(*(counters[i] for i in range(len(cls._fields))))

    def stack(self) -> jax.Array:
        """To i32[7]."""
        return jnp.stack([jnp.asarray(value, jnp.int32) for value in self])

    @property
    def num_free(self) -> jax.Array:
        """i32[]: free blocks of both kinds."""
        return self.num_uncached + self.num_cached

    @property
    def cached_extent(self) -> jax.Array:
        """i32[]: entries between the head and the tail of the cached ring, holes and gap included."""
        return self.compacted + self.gap + self.unswept


_Evicting = tuple[Counters, jax.Array, jax.Array, jax.Array]  # counters, cached, ids, found


class Queues(NamedTuple):
    """The queues with the places of the blocks in them.

    Attributes:
        queue: i32[4N].
        position: i32[N], where in ``queue`` a free block stands; of a block in use, anything in [0, 4N).
        at: counters.
    """

    queue: jax.Array
    position: jax.Array
    at: Counters

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.position.shape[0]


def uncached_index(queues: Queues, offset: jax.Array) -> jax.Array:
    """Index into ``queue`` of the entry ``offset`` places after the head of the uncached ring."""
    return lax.rem(queues.at.uncached_head + offset, queues.num_blocks)


def cached_index(queues: Queues, offset: jax.Array) -> jax.Array:
    """Index into ``queue`` of the entry ``offset`` places after the head of the cached ring."""
    num_blocks = queues.num_blocks
    return num_blocks + lax.rem(queues.at.cached_head + offset, 3 * num_blocks)


def push(queues: Queues, ids: jax.Array, joins: jax.Array, is_cached: jax.Array) -> tuple[Queues, jax.Array]:
    """Put the ``ids`` i32[n] chosen by ``joins`` bool[n] at the tails, in their order.

    Returns:
        The queues (positions not yet written) and the index in ``queue`` where each one went (4N: nowhere).
    """
    to_cached, to_uncached = joins & is_cached, joins & ~is_cached
    cached_rank = jnp.cumsum(to_cached, dtype=jnp.int32)
    uncached_rank = jnp.cumsum(to_uncached, dtype=jnp.int32)
    index = jnp.where(
        is_cached,
        cached_index(queues, queues.at.cached_extent + cached_rank - 1),
        uncached_index(queues, queues.at.num_uncached + uncached_rank - 1),
    )
    index = jnp.where(joins, index, queues.queue.shape[0])
    num_cached = jnp.sum(to_cached, dtype=jnp.int32)
    at = queues.at._replace(
        num_uncached=queues.at.num_uncached + jnp.sum(to_uncached, dtype=jnp.int32),
        unswept=queues.at.unswept + num_cached,
        num_cached=queues.at.num_cached + num_cached,
    )
    return queues._replace(queue=queues.queue.at[index].set(ids, mode="drop"), at=at), index


def remove_cached(queues: Queues, index: jax.Array, leaves: jax.Array) -> Queues:
    """Leave holes at ``index`` i32[n] into ``queue``, where ``leaves`` bool[n]; no entry twice."""
    hole = jnp.where(leaves, index, queues.queue.shape[0])
    at = queues.at._replace(num_cached=queues.at.num_cached - jnp.sum(leaves, dtype=jnp.int32))
    return queues._replace(queue=queues.queue.at[hole].set(-1, mode="drop"), at=at)


def remove(queues: Queues, leaves: jax.Array, cached: jax.Array) -> Queues:
    """Take the free blocks ``leaves`` bool[N], of either kind, out of their queues. Costs O(N).

    It sweeps nothing: a block that left can only make the ring longer when it joins again, and that is swept.

    Args:
        queues: the queues.
        leaves: bool[N], true for free blocks only.
        cached: bool[N], which blocks have cached content.
    """
    num_blocks, at = queues.num_blocks, queues.at
    queued = remove_cached(queues, queues.position, leaves & cached)
    # The uncached ring has no holes: those that stay move up, from the head on.
    lane = jnp.arange(num_blocks, dtype=jnp.int32)
    entries = queues.queue[uncached_index(queues, lane)]
    stays = (lane < at.num_uncached) & ~leaves.at[entries].get(mode="fill", fill_value=False)
    rank = jnp.cumsum(stays, dtype=jnp.int32)
    index = uncached_index(queues, rank - 1)
    return Queues(
        queued.queue.at[jnp.where(stays, index, 4 * num_blocks)].set(entries, mode="drop"),
        queues.position.at[jnp.where(stays, entries, num_blocks)].set(index, mode="drop"),
        queued.at._replace(num_uncached=rank[-1]),
    )


def in_order(queues: Queues) -> jax.Array:
    """i32[N]: the free blocks in the order in which ``pop`` would take them; padding -1. Costs O(N)."""
    num_blocks, at = queues.num_blocks, queues.at
    lane = jnp.arange(num_blocks, dtype=jnp.int32)
    ids = jnp.where(lane < at.num_uncached, queues.queue[uncached_index(queues, lane)], -1)
    offset = jnp.arange(3 * num_blocks, dtype=jnp.int32)
    entries = queues.queue[cached_index(queues, offset)]
    in_gap = (offset >= at.compacted) & (offset < at.compacted + at.gap)
    live = (offset < at.cached_extent) & ~in_gap & (entries >= 0)
    rank = at.num_uncached + jnp.cumsum(live, dtype=jnp.int32) - 1
    return ids.at[jnp.where(live, rank, num_blocks)].set(entries, mode="drop")


def sweep(queues: Queues, num_changes: jax.Array) -> Queues:
    """Sweep enough of the cached ring for ``num_changes`` i32[] joins and holes; nothing where there is no waste."""
    num_blocks = queues.num_blocks
    window = min(_WINDOW, 3 * num_blocks)
    lane = jnp.arange(window, dtype=jnp.int32)

    def unfinished(carry: tuple[Queues, jax.Array]) -> jax.Array:
        queues, budget = carry
        return (budget > 0) & (queues.at.cached_extent > queues.at.num_cached)

    def sweep_window(carry: tuple[Queues, jax.Array]) -> tuple[Queues, jax.Array]:
        queues, budget = carry
        at = queues.at
        taken = jnp.minimum(at.unswept, window)
        ids = queues.queue[cached_index(queues, at.compacted + at.gap + lane)]
        live = (lane < taken) & (ids >= 0)
        rank = jnp.cumsum(live, dtype=jnp.int32)
        index = cached_index(queues, at.compacted + rank - 1)
        kept = rank[-1]
        compacted, gap, unswept = at.compacted + kept, at.gap + taken - kept, at.unswept - taken
        done = unswept == 0
        swept = Queues(
            queues.queue.at[jnp.where(live, index, 4 * num_blocks)].set(ids, mode="drop"),
            queues.position.at[jnp.where(live, ids, num_blocks)].set(index, mode="drop"),
            at._replace(
                compacted=jnp.where(done, 0, compacted),
                gap=jnp.where(done, 0, gap),
                unswept=jnp.where(done, compacted, unswept),
            ),
        )
        return swept, budget - taken

    return lax.while_loop(unfinished, sweep_window, (queues, _SWEPT_PER_CHANGE * num_changes))[0]


def pop(queues: Queues, cached: jax.Array, wanted: jax.Array, capacity: int) -> tuple[Queues, jax.Array, jax.Array]:
    """Take ``wanted`` i32[] free blocks, those with no cached content first; no more than are free.

    Args:
        queues: the queues.
        cached: bool[N], which blocks have cached content; those evicted lose it.
        wanted: at most ``capacity``.
        capacity: static.

    Returns:
        (queues, cached, ids i32[capacity] padded with -1). The first ``num_uncached`` (of before) had no content.
    """
    at, lane = queues.at, jnp.arange(capacity, dtype=jnp.int32)
    num_uncached = jnp.minimum(wanted, at.num_uncached)
    ids = jnp.where(lane < num_uncached, queues.queue[uncached_index(queues, lane)], -1)
    queues = queues._replace(
        at=at._replace(
            uncached_head=lax.rem(at.uncached_head + num_uncached, queues.num_blocks),
            num_uncached=at.num_uncached - num_uncached,
        )
    )
    at, cached, ids = _evict(queues, cached, ids, num_uncached, wanted)
    # What is put into the queue later must not overtake what was read from it here.
    return queues._replace(queue=after(queues.queue, ids), at=at), cached, ids


def _evict(
    queues: Queues, cached: jax.Array, ids: jax.Array, found: jax.Array, wanted: jax.Array
) -> tuple[Counters, jax.Array, jax.Array]:
    """Fill ``ids[found:wanted]`` from the head of the cached ring. Each hole passed is passed once and for all."""
    num_blocks, capacity = queues.num_blocks, ids.shape[0]
    window = min(_WINDOW, 3 * num_blocks)
    lane = jnp.arange(window, dtype=jnp.int32)

    def evict_window(carry: _Evicting) -> _Evicting:
        at, cached, ids, found = carry
        past_gap = at.compacted == 0
        at = at._replace(
            cached_head=jnp.where(past_gap, at.cached_head + at.gap, at.cached_head),
            gap=jnp.where(past_gap, 0, at.gap),
        )
        region = jnp.where(past_gap, at.unswept, at.compacted)
        entries = queues.queue[cached_index(queues._replace(at=at), lane)]
        live = (lane < region) & (entries >= 0)
        rank = jnp.cumsum(live, dtype=jnp.int32)
        taken = live & (rank <= wanted - found)
        passed_all = rank[-1] <= wanted - found
        passed = jnp.where(passed_all, jnp.minimum(region, window), jnp.max(jnp.where(taken, lane + 1, 0)))
        ids = ids.at[jnp.where(taken, found + rank - 1, capacity)].set(entries, mode="drop")
        cached = cached.at[jnp.where(taken, entries, num_blocks)].set(False, mode="drop")
        num_taken = jnp.minimum(rank[-1], wanted - found)
        at = at._replace(
            cached_head=lax.rem(at.cached_head + passed, 3 * num_blocks),
            compacted=jnp.where(past_gap, 0, at.compacted - passed),
            unswept=jnp.where(past_gap, at.unswept - passed, at.unswept),
            num_cached=at.num_cached - num_taken,
        )
        return at, cached, ids, found + num_taken

    at, cached, ids, _ = lax.while_loop(lambda carry: carry[3] < wanted, evict_window, (queues.at, cached, ids, found))
    return at, cached, ids
