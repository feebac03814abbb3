"""Renaming blocks so that those in use have the lowest ids, or stand in runs. Pure functions; they cost O(pool)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache.grouped_rows import GroupedRows


@dataclasses.dataclass(frozen=True)
class DefragmentationReport:
    """What ``KVCacheManager.defragment`` did.

    Attributes:
        num_moved: blocks whose content was copied.
        num_in_use: blocks that requests hold; if any were moved, their ids are 0 .. num_in_use - 1 now.
        num_cached: free blocks with cached content; they follow where they were not in the way.
        run_share: before, how many of the blocks that requests hold stood right behind the one before, of those that
            have one before; 1.0 if none have.
    """

    num_moved: int
    num_in_use: int
    num_cached: int
    run_share: float


def compacting(in_use: np.ndarray) -> np.ndarray:
    """New ids i32[N] that move as little as possible: each block in use past the end changes places with a gap.

    Args:
        in_use: bool[N].
    """
    new_ids = np.arange(len(in_use), dtype=np.int32)
    end = int(in_use.sum())
    gaps, beyond = np.flatnonzero(~in_use[:end]), end + np.flatnonzero(in_use[end:])
    new_ids[beyond], new_ids[gaps] = gaps, beyond
    return new_ids


def in_runs(blocks: np.ndarray, in_use: np.ndarray) -> np.ndarray:
    """New ids i32[N] in the order in which rows name their blocks, so that each row's own blocks stand in one run.

    Args:
        blocks: i32[rows, columns], padding -1. A block that several rows share stands in the first one's run.
        in_use: bool[N], the blocks that rows name.
    """
    named = blocks[blocks >= 0]
    _, first = np.unique(named, return_index=True)
    order = named[np.sort(first)]
    new_ids = np.empty(len(in_use), np.int32)
    new_ids[order] = np.arange(len(order))
    new_ids[~in_use] = np.arange(len(order), len(in_use))
    return new_ids


def run_share(blocks: np.ndarray) -> float:
    """Of the blocks in ``blocks`` i32[rows, columns], padding -1, that follow another: the share right behind it."""
    before, after = blocks[:, :-1], blocks[:, 1:]
    follows = (before >= 0) & (after >= 0)
    number = int(follows.sum())
    return float((follows & (after == before + 1)).sum() / number) if number else 1.0


@jax.jit
def renamed(state: GroupedRows, new_ids: jax.Array) -> GroupedRows:
    """The same blocks under other names: block b is ``new_ids[b]``, a permutation i32[N]."""
    pool, table = state.pool, state.table

    def moved(values: jax.Array) -> jax.Array:
        return jnp.zeros_like(values).at[new_ids].set(values)

    def follow(ids: jax.Array) -> jax.Array:
        return jnp.where(ids >= 0, new_ids[ids], ids)

    pool = dataclasses.replace(
        pool,
        ref_counts=moved(pool.ref_counts),
        cached=moved(pool.cached),
        position=moved(pool.position),
        queue=follow(pool.queue),
    )
    return dataclasses.replace(state, pool=pool, table=dataclasses.replace(table, blocks=follow(table.blocks)))
