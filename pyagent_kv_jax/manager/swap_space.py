"""Where preempted requests wait: blocks of host memory, and who has which of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pyagent_kv_jax.cache.kv_cache_transfer import KVCacheTransfer
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.manager.known_tokens import TokenRecord
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables.padding import padded, power_of_two


@dataclasses.dataclass(frozen=True)
class SwappedRequest:
    """A request whose blocks stand in host memory.

    Attributes:
        num_tokens: that it holds.
        host_blocks: i32[G, columns], -1 where its group had given the block back.
        record: its tokens, as far as they are known; None: not at all.
        hollow: i32[G], leading tokens that the blocks of each group do not hold.
    """

    num_tokens: int
    host_blocks: np.ndarray
    record: TokenRecord | None
    hollow: np.ndarray

    @property
    def block_ids(self) -> np.ndarray:
        """i32[n], the host blocks."""
        return self.host_blocks[self.host_blocks >= 0]


class SwapSpace:
    """A pool of host blocks and the transfers to and from it. Not thread-safe: the manager's lock is above it."""

    def __init__(self, config: KVCacheConfig, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.requests: dict[str, SwappedRequest] = {}
        self._config = config
        self._transfer: KVCacheTransfer | None = None  # its host memory is taken at the first swap
        self._pool: BlockPool | None = None
        if num_blocks:
            host = DeviceType.CPU.devices()[0]
            with jax.default_device(host):
                self._pool = jax.device_put(BlockPool.create(num_blocks), host)

    @property
    def num_free(self) -> int:
        """Host blocks that are free."""
        return 0 if self._pool is None else int(Counters(*np.asarray(self._pool.counters)).num_free)

    def put(self, request_id: str, swapped: SwappedRequest) -> None:
        """Keep a request that ``allocate`` found room for."""
        self.requests[request_id] = swapped

    def allocate(self, wanted: np.ndarray) -> np.ndarray | None:
        """Host blocks i32[...] in the place of each id of ``wanted`` that is not -1; None: too few are free."""
        count = int((wanted >= 0).sum())
        if count > self.num_free:
            return None
        out = np.full(wanted.shape, -1, np.int32)
        if count:
            assert self._pool is not None
            self._pool, admitted = self._pool.allocate(np.array([count]), capacity=power_of_two(count))
            out[wanted >= 0] = np.asarray(admitted.ids)[:count]
        return out

    def drop(self, request_id: str) -> SwappedRequest:
        """Forget a request and free its host blocks."""
        swapped = self.requests.pop(request_id)
        self.release(swapped.block_ids)
        return swapped

    def release(self, ids: np.ndarray) -> None:
        """Free host blocks."""
        if len(ids):
            assert self._pool is not None
            self._pool, _ = self._pool.free(padded(ids))

    def copy_out(self, pages: KVPages, blocks: np.ndarray, host_blocks: np.ndarray) -> None:
        """Copy ``blocks`` i32[n] of ``pages`` into ``host_blocks`` i32[n]; asynchronous."""
        if self._transfer is None:
            self._transfer = KVCacheTransfer(self._config, self.num_blocks)
        self._transfer.swap_out(pages, blocks, host_blocks)

    def copy_in(self, pages: KVPages, host_blocks: np.ndarray, blocks: np.ndarray) -> KVPages:
        """The pages, donated, with ``host_blocks`` i32[n] copied into ``blocks`` i32[n]; asynchronous."""
        assert self._transfer is not None
        return self._transfer.swap_in(pages, host_blocks, blocks)
