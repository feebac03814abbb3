"""Blocks by hand: a pool of the device's blocks and one of the host's, for users who think in blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from pyagent_kv_jax.arguments import integer, layer_index
from pyagent_kv_jax.cache.block_views import KVCacheBlock
from pyagent_kv_jax.config import BlockAllocationStrategy, KVCacheConfig
from pyagent_kv_jax.errors import DoubleFreeError, InvalidArgumentError, InvalidBlockError
from pyagent_kv_jax.pool.host_pool import HostPool

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
        sizes = {_DEVICE: self.config.pool_blocks, _HOST: num_host_blocks}
        self._pools = {on_host: HostPool(size, self._num_nodes[on_host]) for on_host, size in sizes.items()}

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
            self._pools[block.on_host].take(np.array([block.block_id], np.int32))
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
                    self._pools[on_host].free(np.array(ids, np.int32))
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
            return self._pools[on_host].num_free

    def _allocate(
        self, on_host: bool, n: int, layer_idx: int, strategy: BlockAllocationStrategy, node: int | None
    ) -> list[KVCacheBlock]:
        count, group = int(integer("n", n)), self._group_of(layer_idx)
        if count < 0:
            raise InvalidArgumentError(f"n: got {count}, want 0 or more")
        with self._lock:
            ids = self._pools[on_host].allocate(count, strategy, node)
        return [self._view(block_id, on_host, group) for block_id in ids.tolist()]

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
        return self.config.group_of(layer_index(layer_idx, self.config.num_layers, "layer_idx"))

    def _check_held(self, blocks: list[KVCacheBlock], error: type[InvalidBlockError]) -> None:
        """Every block has, in its pool, as many references as it is named here; before anything changes."""
        for on_host in (_DEVICE, _HOST):
            ids = np.array([block.block_id for block in blocks if block.on_host == on_host], np.int32)
            self._pools[on_host].check_held(ids, error, f"blocks of the {'host' if on_host else 'device'}")
