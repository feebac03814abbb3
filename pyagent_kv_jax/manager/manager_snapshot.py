"""All that a ``KVCacheManager`` holds at one moment, as plain arrays on the host: for pictures and for debugging."""

from __future__ import annotations

import dataclasses

import numpy as np

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.manager.manager_parts import ManagerParts
from pyagent_kv_jax.manager.prefix.chain_places import CachedBlocks


@dataclasses.dataclass(frozen=True)
class ManagerSnapshot:
    """n requests that hold blocks, N blocks, G layer groups. Nothing in it changes any more.

    Attributes:
        config: of the cache.
        request_ids: n, in the order they came.
        num_tokens: i64[n].
        block_tables: i32[G, n, W], blocks of each request, those in reserve too; -1 where there is none. W is as wide
            as the longest needs.
        references: i32[N], requests that hold each block.
        cached: bool[N], whether a block has content that a request could share, or that is kept though it is free.
        prefix_blocks: G, what the prefix cache knows of each group.
    """

    config: KVCacheConfig
    request_ids: tuple[str, ...]
    num_tokens: np.ndarray
    block_tables: np.ndarray
    references: np.ndarray
    cached: np.ndarray
    prefix_blocks: tuple[CachedBlocks, ...]


def snapshot_of(state: ManagerParts) -> ManagerSnapshot:
    """Read everything once; costs O(pool)."""
    control = state.control
    pool, ids = control.state.pool, state.rows.ids()
    rows = np.array([state.rows.row_of(request_id) for request_id in ids], np.int64)
    width = int(control.columns()[rows].max(initial=0))
    return ManagerSnapshot(
        config=state.config,
        request_ids=tuple(ids),
        num_tokens=control.lengths()[rows].astype(np.int64),
        block_tables=control.tables()[:, rows, :width].copy(),
        references=np.array(pool.ref_counts),
        cached=np.array(pool.cached),
        prefix_blocks=tuple(state.prefixes.cached_blocks(group) for group in range(len(state.config.groups))),
    )
