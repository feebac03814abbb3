"""Blocks by hand: a pool of the device's blocks and one of the host's, for users who think in blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from pyagent_kv_jax.arguments import integer
from pyagent_kv_jax.cache.block_views import KVCacheBlock
from pyagent_kv_jax.config import BlockAllocationStrategy, DeviceType, KVCacheConfig
from pyagent_kv_jax.errors import DoubleFreeError, InvalidArgumentError, InvalidBlockError, OutOfBlocksError
from pyagent_kv_jax.pool import BlockPool, allocate_blocks, require_allocated, require_nodes
from pyagent_kv_jax.tables.padding import padded, power_of_two

_DEVICE, _HOST = False, True  # keys of the pools: ``KVCacheBlock.on_host``
_SCATTERED = BlockAllocationStrategy.SCATTERED


class KVCacheAllocator:
    """Gives out blocks and takes them back, one or many a call; all of them or none.

    It holds ids and reference counts on the host's CPU, not pages: those are ``KVPages`` and ``HostPages``. Methods
    may be called from any thread.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        num_host_blocks: int | None = None,
        *,
        num_device_nodes: int = 1,
        num_host_nodes: int = 1,
    ) -> None:
        """``config.num_blocks`` device blocks and ``num_host_blocks`` (None: as many) host blocks, all free.

        For NUMA_AWARE, the device blocks are spread over ``num_device_nodes`` devices in equal ranges of ids, and the
        host blocks over ``num_host_nodes``: see ``node_of_block``.

        Raises:
            ConfigError: ``num_host_blocks`` is not a positive integer, or nodes that do not divide the blocks.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        self.config = config
        self._num_nodes = {_DEVICE: num_device_nodes, _HOST: num_host_nodes}
        self._lock = threading.Lock()
        self._init_pools(config.pool_blocks if num_host_blocks is None else num_host_blocks)

    def _init_pools(self, num_host_blocks: int) -> None:
        host = DeviceType.CPU.devices()[0]
        with jax.default_device(host):
            pools = {_DEVICE: BlockPool.create(self.config.pool_blocks), _HOST: BlockPool.create(num_host_blocks)}
        # Committed, so that the numpy arguments of every call follow them.
        self._pools: dict[bool, BlockPool] = jax.device_put(pools, host)
        for on_host, pool in pools.items():
            require_nodes(pool.num_blocks, self._num_nodes[on_host])

    def allocate_gpu_block(self, layer_idx: int = 0) -> KVCacheBlock:
        """A block of the device for the group of layer ``layer_idx``; raises as ``allocate_gpu_blocks``."""
        return self.allocate_gpu_blocks(1, layer_idx)[0]

    def allocate_cpu_block(self, layer_idx: int = 0) -> KVCacheBlock:
        """A block of the host for the group of layer ``layer_idx``; raises as ``allocate_gpu_blocks``."""
        return self.allocate_cpu_blocks(1, layer_idx)[0]

    def allocate_gpu_blocks(
        self, n: int, layer_idx: int = 0, *, strategy: BlockAllocationStrategy = _SCATTERED, node: int | None = None
    ) -> list[KVCacheBlock]:
        """``n`` blocks of the device, each with one reference, for the group of layer ``layer_idx``.

        Args:
            n: how many.
            layer_idx: a layer of the group.
            strategy: which of the free blocks, see ``pool.allocate_blocks``; another one each call, if you like.
            node: with NUMA_AWARE, whose blocks to take first.

        Raises:
            OutOfBlocksError: fewer are free, or with CONTIGUOUS fewer in a row; none is taken.
            InvalidArgumentError: a negative count, no layer of the model, no such node, or PREDICTIVE, which
                ``PredictiveBlockAllocator`` does.
        """
        return self._allocate(_DEVICE, n, layer_idx, strategy, node)

    def allocate_cpu_blocks(
        self, n: int, layer_idx: int = 0, *, strategy: BlockAllocationStrategy = _SCATTERED, node: int | None = None
    ) -> list[KVCacheBlock]:
        """``n`` blocks of the host; else as ``allocate_gpu_blocks``."""
        return self._allocate(_HOST, n, layer_idx, strategy, node)

    def share_block(self, block: KVCacheBlock) -> KVCacheBlock:
        """One more reference to a block in use: it takes one more ``free_block`` to be free.

        Raises:
            InvalidBlockError: it is free, or not of these pools.
        """
        shared = block.acquire()
        with self._lock:
            self._check_held([block], InvalidBlockError)
            self._pools[block.on_host] = _share(self._pools[block.on_host], np.array([block.block_id], np.int32))
        return shared

    def free_block(self, block: KVCacheBlock) -> KVCacheBlock:
        """Drop one reference; raises as ``free_blocks``.

        Returns:
            The view after that.
        """
        return self.free_blocks([block])[0]

    def free_blocks(self, blocks: Iterable[KVCacheBlock]) -> list[KVCacheBlock]:
        """Drop one reference to each block, of either pool: all or none. Without references a block is free.

        Returns:
            The views after that.

        Raises:
            DoubleFreeError: one is free already, by its view or in its pool.
            InvalidBlockError: an id outside its pool.
        """
        blocks = list(blocks)
        released = [block.release() for block in blocks]
        with self._lock:
            self._check_held(blocks, DoubleFreeError)
            for on_host in (_DEVICE, _HOST):
                ids = [block.block_id for block in blocks if block.on_host == on_host]
                if ids:
                    self._pools[on_host] = _free(self._pools[on_host], padded(np.array(ids, np.int32)))
        return released

    def get_num_free_gpu_blocks(self) -> int:
        """Free blocks of the device."""
        return self._num_free(_DEVICE)

    def get_num_free_cpu_blocks(self) -> int:
        """Free blocks of the host."""
        return self._num_free(_HOST)

    def usage(self) -> float:
        """Share of the device's blocks in use, 0.0 to 1.0."""
        return 1.0 - self.get_num_free_gpu_blocks() / self.config.pool_blocks

    def _num_free(self, on_host: bool) -> int:
        with self._lock:
            return int(_count_free(self._pools[on_host]))

    def _allocate(
        self, on_host: bool, n: int, layer_idx: int, strategy: BlockAllocationStrategy, node: int | None
    ) -> list[KVCacheBlock]:
        count, group = int(integer("n", n)), self._group_of(layer_idx)
        if count < 0:
            raise InvalidArgumentError(f"n: got {count}, want 0 or more")
        with self._lock:
            if strategy == _SCATTERED and node is None:
                ids = self._allocate_any(on_host, count)
            else:
                ids = self._allocate_by(strategy, node, on_host, count)
        return [self._view(block_id, on_host, group) for block_id in ids]

    def _allocate_any(self, on_host: bool, count: int) -> list[int]:
        if not count:
            return []
        pool = self._pools[on_host]
        free = int(_count_free(pool))
        if count > free:
            where = "host" if on_host else "device"
            raise OutOfBlocksError(f"got a request for {count} blocks of the {where}, want at most the {free} free")
        self._pools[on_host], ids = _take(pool, np.array([count], np.int32), capacity=power_of_two(count))
        return np.array(ids)[:count].tolist()

    def _allocate_by(self, strategy: BlockAllocationStrategy, node: int | None, on_host: bool, count: int) -> list[int]:
        counts, num_nodes = np.array([count], np.int32), self._num_nodes[on_host]
        capacity = power_of_two(count)
        how: dict[str, Any] = {"strategy": strategy, "node": node, "num_nodes": num_nodes}
        pool, admission = allocate_blocks(self._pools[on_host], counts, capacity=capacity, **how)
        require_allocated(pool, counts, admission, strategy)
        self._pools[on_host] = pool
        return np.asarray(admission.ids)[:count].tolist()

    def _view(self, block_id: int, on_host: bool, group: int) -> KVCacheBlock:
        config = self.config
        return KVCacheBlock(block_id, device=config.device_type, on_host=on_host, group=group).allocate(
            config.num_heads,
            config.storage_head_dim(config.head_dim),
            config.block_size,
            config.kv_dtype,
            num_layers=config.layers_per_group,
            v_head_dim=config.storage_head_dim(config.value_head_dim),
        )

    def _group_of(self, layer_idx: int) -> int:
        layer = int(integer("layer_idx", layer_idx))
        for index, group in enumerate(self.config.groups):
            if layer in group.layers:
                return index
        raise InvalidArgumentError(f"layer_idx: got {layer}, want 0 to {self.config.num_layers - 1}")

    def _check_held(self, blocks: list[KVCacheBlock], error: type[InvalidBlockError]) -> None:
        """Every block has, in its pool, as many references as it is named here; before anything changes."""
        for on_host in (_DEVICE, _HOST):
            pool = self._pools[on_host]
            ids, times = np.unique([b.block_id for b in blocks if b.on_host == on_host], return_counts=True)
            where = f"blocks of the {'host' if on_host else 'device'}"
            outside = ids >= pool.num_blocks
            if outside.any():
                raise InvalidBlockError(f"{where}: got {ids[outside].tolist()}, want 0 to {pool.num_blocks - 1}")
            if not len(ids):
                continue
            held = np.asarray(_references(pool, padded(np.array(ids, np.int32))))[: len(ids)]
            if (held < times).any():
                raise error(f"{where}: got {ids[held < times].tolist()}, want blocks with that many references")


@partial(jax.jit, donate_argnums=0, static_argnames="capacity")
def _take(pool: BlockPool, counts: jax.Array, *, capacity: int) -> tuple[BlockPool, jax.Array]:
    pool, admission = pool.allocate(counts, capacity=capacity)
    return pool, admission.ids


@partial(jax.jit, donate_argnums=0)
def _free(pool: BlockPool, ids: jax.Array) -> BlockPool:
    return pool.free(ids)[0]


@partial(jax.jit, donate_argnums=0)
def _share(pool: BlockPool, ids: jax.Array) -> BlockPool:
    return pool.share(ids)[0]


@jax.jit
def _count_free(pool: BlockPool) -> jax.Array:
    return pool.num_free


@jax.jit
def _references(pool: BlockPool, ids: jax.Array) -> jax.Array:
    """i32[n], of blocks ``ids``; what stands for padding is of no use."""
    return pool.ref_counts[ids]
