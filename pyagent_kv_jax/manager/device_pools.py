"""Pools on the host for blocks that live on several devices."""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.arguments import is_count
from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.distributed.owned import spill_of_row
from pyagent_kv_jax.errors import ConfigError, DoubleFreeError, InvalidArgumentError, OutOfBlocksError
from pyagent_kv_jax.pool.allocation_strategy import longest_free_run
from pyagent_kv_jax.pool.host_blocks import HostBlocks
from pyagent_kv_jax.pool.host_pool import HostPool


class DevicePools(HostBlocks):
    """N blocks, N / D on each of D devices: a ``HostPool`` for each, so that no call costs more when N is greater.

    Device d has ids ``d * N / D`` to ``(d + 1) * N / D - 1``, and who gives blocks is the rule of ``plan_spill``, as in
    a ``DistributedBlockTable``; but here one place sees all free counts, and no collective is needed. Not thread-safe.
    """

    knows_nodes = True

    def __init__(self, num_blocks: int, num_devices: int) -> None:
        """All blocks free.

        Raises:
            ConfigError: not a count of blocks, or not a multiple of ``num_devices``.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        if not is_count(num_blocks) or num_blocks % num_devices:
            raise ConfigError(f"num_blocks: got {num_blocks!r}, want a multiple of {num_devices} devices")
        self._pools = [HostPool(num_blocks // num_devices) for _ in range(num_devices)]

    @property
    def num_blocks(self) -> int:
        """See ``HostBlocks``."""
        return self._pools[0].num_blocks * len(self._pools)

    @property
    def num_free(self) -> int:
        """See ``HostBlocks``."""
        return int(self.free_by_device().sum())

    @property
    def num_devices(self) -> int:
        """D."""
        return len(self._pools)

    def free_by_device(self) -> np.ndarray:
        """i64[D]: free blocks of each device."""
        return np.array([pool.num_free for pool in self._pools])

    def used_by_device(self, but: np.ndarray) -> np.ndarray:
        """i64[D]: blocks with references of each device, ``but`` for these, i32[n], each named once."""
        spared = np.bincount(self.device_of(but), minlength=self.num_devices)
        return self._pools[0].num_blocks - self.free_by_device() - spared

    def device_of(self, ids: np.ndarray) -> np.ndarray:
        """The device that each of these blocks lies on, i32[n]."""
        return ids // self._pools[0].num_blocks

    def ref_counts(self) -> np.ndarray:
        """See ``HostBlocks``."""
        return np.concatenate([pool.ref_counts() for pool in self._pools])

    def allocate(
        self,
        count: int,
        strategy: BlockAllocationStrategy = BlockAllocationStrategy.SCATTERED,
        node: int | None = None,
    ) -> np.ndarray:
        """``count`` blocks, i32[count], each with one reference.

        Args:
            count: at least 0.
            strategy: SCATTERED and NUMA_AWARE are the rule of ``plan_spill``; CONTIGUOUS: a run on one device, the one
                with most free blocks that has such a run.
            node: the device whose blocks come first; for NUMA_AWARE; may be named with SCATTERED.

        Raises:
            OutOfBlocksError: fewer are free, or no run is as long.
            InvalidArgumentError: a negative count, or a strategy or node that the pools cannot serve.
        """
        if count < 0:
            raise InvalidArgumentError(f"count: got {count}, want 0 or more")
        if node is not None and not 0 <= node < len(self._pools):
            raise InvalidArgumentError(f"node: got {node}, want 0 to {len(self._pools) - 1}")
        kinds = BlockAllocationStrategy
        if strategy == kinds.CONTIGUOUS and node is None:
            return self._run(count)
        if strategy not in (kinds.SCATTERED, kinds.NUMA_AWARE) or (node is None and strategy == kinds.NUMA_AWARE):
            return self._pools[0].allocate(count, strategy, node)  # refused there
        free = self.free_by_device()
        if count > free.sum():
            raise OutOfBlocksError(f"got a request for {count} blocks, want at most the {free.sum()} free")
        parts = spill_of_row(free, count, -1 if node is None else node)
        return np.concatenate(
            [np.zeros(0, np.int32), *(self._ids(device, self._pools[device].allocate(n)) for device, n in parts)]
        )

    def _run(self, count: int) -> np.ndarray:
        for device in np.argsort(-self.free_by_device(), kind="stable").tolist():
            try:
                return self._ids(device, self._pools[device].allocate(count, BlockAllocationStrategy.CONTIGUOUS))
            except OutOfBlocksError:
                continue
        most = max(int(longest_free_run(pool.pool)) for pool in self._pools)
        raise OutOfBlocksError(
            f"got a request for {count} consecutive blocks, want at most {most}, the longest run of the "
            f"{self.num_free} free blocks on one device"
        )

    def take(self, ids: np.ndarray) -> None:
        """See ``HostBlocks``."""
        self.check_inside(ids)
        for pool, own in self._by_device(ids):
            pool.take(own)

    def free(self, ids: np.ndarray) -> None:
        """See ``HostBlocks``."""
        self.check_held(ids, DoubleFreeError)
        for pool, own in self._by_device(ids):
            pool.free(own)

    def _ids(self, device: int, own: np.ndarray) -> np.ndarray:
        return own + np.int32(device * self._pools[0].num_blocks)

    def _by_device(self, ids: np.ndarray) -> list[tuple[HostPool, np.ndarray]]:
        """The pools concerned, and the ids i32[...] as each one counts its own."""
        owners = self.device_of(ids)
        size = self._pools[0].num_blocks
        return [(self._pools[device], ids[owners == device] - device * size) for device in np.unique(owners).tolist()]
