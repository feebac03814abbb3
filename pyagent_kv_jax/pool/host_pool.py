"""A pool on the host's XLA CPU device, for objects that hand out blocks call by call."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.errors import DoubleFreeError, InvalidArgumentError, OutOfBlocksError
from pyagent_kv_jax.pool.allocation_strategy import allocate_blocks, require_allocated, require_nodes
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.pool.host_blocks import HostBlocks
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables.host_step import made_on_host
from pyagent_kv_jax.tables.padding import padded, power_of_two

_FEWEST = 16  # blocks; shorter lists are padded to as many, so that few programs are compiled


class HostPool(HostBlocks):
    """Owns a ``BlockPool`` and donates it to each call. Not thread-safe: a lock is above it.

    Whatever raises does so before anything changes.
    """

    def __init__(self, num_blocks: int, num_nodes: int = 1, ref_counts: np.ndarray | None = None) -> None:
        """Blocks that are spread over ``num_nodes`` nodes in equal ranges of ids.

        Args:
            num_blocks: N.
            num_nodes: divides N.
            ref_counts: i32[N], references that they have. None: all are free.

        Raises:
            ConfigError: not a count of blocks, or nodes that do not divide it.
            InvalidBlockError: a negative count of references.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        self._pool: BlockPool = made_on_host(
            lambda: BlockPool.create(num_blocks) if ref_counts is None else BlockPool.with_references(ref_counts)
        )
        require_nodes(num_blocks, num_nodes)
        self._num_nodes = num_nodes

    @property
    def pool(self) -> BlockPool:
        """The pool as it is; valid until the next call."""
        return self._pool

    @property
    def num_blocks(self) -> int:
        """See ``HostBlocks``."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """See ``HostBlocks``."""
        return int(Counters(*np.asarray(self._pool.counters)).num_free)

    def ref_counts(self) -> np.ndarray:
        """See ``HostBlocks``."""
        return np.asarray(self._pool.ref_counts)

    def allocate(
        self,
        count: int,
        strategy: BlockAllocationStrategy = BlockAllocationStrategy.SCATTERED,
        node: int | None = None,
    ) -> np.ndarray:
        """See ``HostBlocks``."""
        if count < 0:
            raise InvalidArgumentError(f"count: got {count}, want 0 or more")
        if strategy != BlockAllocationStrategy.SCATTERED or node is not None:
            return self._allocate_by(strategy, node, count)
        if count > self.num_free:
            raise OutOfBlocksError(f"got a request for {count} blocks, want at most the {self.num_free} free")
        if not count:
            return np.zeros(0, np.int32)
        self._pool, ids = _allocate(self._pool, np.array([count], np.int32), capacity=_padded_size(count))
        return np.asarray(ids)[:count].copy()

    def _allocate_by(self, strategy: BlockAllocationStrategy, node: int | None, count: int) -> np.ndarray:
        counts = np.array([count], np.int32)
        how: dict[str, Any] = {"strategy": strategy, "node": node, "num_nodes": self._num_nodes}
        capacity = _padded_size(min(count, self.num_blocks))  # more are refused anyway
        pool, admission = allocate_blocks(self._pool, counts, capacity=capacity, **how)
        require_allocated(pool, counts, admission, strategy)
        self._pool = pool
        return np.asarray(admission.ids)[:count].copy()

    def take(self, ids: np.ndarray) -> None:
        """See ``HostBlocks``."""
        self.check_inside(ids)
        if len(ids):
            self._pool = _take(self._pool, padded(ids, _padded_size(len(ids))))

    def free(self, ids: np.ndarray) -> None:
        """See ``HostBlocks``."""
        self.check_held(ids, DoubleFreeError)
        if len(ids):
            self._pool = _free(self._pool, padded(ids, _padded_size(len(ids))))


def _padded_size(count: int) -> int:
    return max(power_of_two(count), _FEWEST)


@partial(jax.jit, donate_argnums=0, static_argnames="capacity")
def _allocate(pool: BlockPool, counts: jax.Array, *, capacity: int) -> tuple[BlockPool, jax.Array]:
    pool, admission = pool.allocate(counts, capacity=capacity)
    return pool, admission.ids


@partial(jax.jit, donate_argnums=0)
def _take(pool: BlockPool, ids: jax.Array) -> BlockPool:
    return pool.take(ids)[0]


@partial(jax.jit, donate_argnums=0)
def _free(pool: BlockPool, ids: jax.Array) -> BlockPool:
    return pool.free(ids)[0]
