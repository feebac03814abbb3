"""What is true of every pool, and of a pool with its table. Costs O(pool): for tests, debugging and soak runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from pyagent_kv_jax.errors import InvalidBlockError, is_concrete
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables import BlockTable


def check_invariants(pool: BlockPool, table: BlockTable | None = None, released: jax.Array | None = None) -> None:
    """Raise when ``pool``, or ``pool`` and ``table`` together, contradict themselves.

    ``released`` i32[R] says how many leading columns of each row were given back, and are -1; None: none. With
    plain values: one error that lists everything broken, with the first blocks (or rows) concerned. Traced: one
    ``checkify.debug_check`` for each invariant, in ``checking()`` or not: this is here to check.

    Raises:
        InvalidBlockError: something is broken.
    """
    broken = (broken_invariants if is_concrete(pool, table, released) else _broken)(pool, table, released)
    if not is_concrete(broken):
        for what, where in broken.items():
            checkify.debug_check(~jnp.any(where), f"{InvalidBlockError.__name__}: {what}")
        return
    found = {what: np.flatnonzero(np.asarray(where)) for what, where in broken.items()}
    lines = [f"{what}: {len(at)} times, first at {at[:5].tolist()}" for what, at in found.items() if len(at)]
    if lines:
        raise InvalidBlockError(f"pool of {pool.num_blocks} blocks: " + "; ".join(lines))


def _broken(
    pool: BlockPool, table: BlockTable | None = None, released: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What is broken -> bool array, true where (by block, by row, or [1])."""
    broken = _broken_counts(pool) | _broken_queues(pool)
    return broken if table is None else broken | _broken_rows(pool, table, released)


broken_invariants = jax.jit(_broken)


def _broken_counts(pool: BlockPool) -> dict[str, jax.Array]:
    at = Counters.of(pool.counters)
    used = jnp.sum(pool.ref_counts > 0)
    return {
        "a reference count is negative": pool.ref_counts < 0,
        "free and used blocks are not all blocks": (at.num_free + used != pool.num_blocks)[None],
        "a queue counter is negative": pool.counters < 0,
        "the queue of cached blocks outgrows twice the pool": (at.cached_extent > 2 * pool.num_blocks)[None],
    }


def _broken_queues(pool: BlockPool) -> dict[str, jax.Array]:
    num_blocks, at, index = pool.num_blocks, Counters.of(pool.counters), jnp.arange(4 * pool.num_blocks)
    is_cached_ring = index >= num_blocks
    ring = jnp.where(is_cached_ring, 3 * num_blocks, num_blocks)
    head = jnp.where(is_cached_ring, num_blocks + at.cached_head, at.uncached_head)
    offset = (index - head) % ring
    in_gap = is_cached_ring & (offset >= at.compacted) & (offset < at.compacted + at.gap)
    filled = (offset < jnp.where(is_cached_ring, at.cached_extent, at.num_uncached)) & ~in_gap
    live = filled & ((pool.queue >= 0) | ~is_cached_ring)
    outside = live & ((pool.queue < 0) | (pool.queue >= num_blocks))
    block = jnp.where(live & ~outside, pool.queue, num_blocks)
    times = jnp.zeros(num_blocks, jnp.int32).at[block].add(1, mode="drop")
    wrong_kind = live & (pool.cached.at[block].get(mode="fill", fill_value=False) != is_cached_ring)
    wrong_place = live & (pool.position.at[block].get(mode="fill", fill_value=-1) != index)
    free, nowhere = pool.ref_counts == 0, jnp.zeros(num_blocks, bool)
    return {
        "a queue holds what is no block": outside,
        "a free block is not queued exactly once": free & (times != 1),
        "a block in use is queued": ~free & (times != 0),
        "a block stands in the queue of the other kind": nowhere.at[block].max(wrong_kind, mode="drop"),
        "a block's position is not where it stands": nowhere.at[block].max(wrong_place, mode="drop"),
        "a position lies outside the queue": (pool.position < 0) | (pool.position >= 4 * num_blocks),
        "the count of free cached blocks is wrong": (jnp.sum(live & is_cached_ring) != at.num_cached)[None],
    }


def _broken_rows(pool: BlockPool, table: BlockTable, released: jax.Array | None) -> dict[str, jax.Array]:
    num_blocks, width = pool.num_blocks, table.blocks.shape[1]
    released = jnp.zeros(table.num_rows, jnp.int32) if released is None else released
    column = jnp.arange(width)
    held = (column >= released[:, None]) & (column < table.num_blocks[:, None])
    inside = (table.blocks >= 0) & (table.blocks < num_blocks)
    named = jnp.where(held & inside, table.blocks, num_blocks)
    times = jnp.zeros(num_blocks, jnp.int32).at[named].add(1, mode="drop")
    return {
        "a row names what is no block": jnp.any(held & ~inside, axis=1),
        "a row is not padded with -1": jnp.any(~held & (table.blocks != -1), axis=1),
        "a row's count of blocks or tokens is out of range": (
            (table.num_blocks < 0) | (table.num_blocks > width) | (table.num_tokens < 0) | (released > table.num_blocks)
        ),
        "rows name a block that is free": (times > 0) & (pool.ref_counts == 0),
        "rows share a block more often than it has references": (times > pool.ref_counts) & (pool.ref_counts > 0),
    }
