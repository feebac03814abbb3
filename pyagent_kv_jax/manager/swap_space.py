"""Where preempted requests wait: blocks of host memory, and who has which of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from pyagent_kv_jax.cache.block_size_change import BlockSizeChange, change_block_size
from pyagent_kv_jax.cache.kv_cache_transfer import KVCacheTransfer
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher
from pyagent_kv_jax.manager.prefix.known_tokens import TokenRecord
from pyagent_kv_jax.pool.host_pool import HostPool


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
        self._num_pages = num_blocks * config.pages_per_block
        self._transfer: KVCacheTransfer | None = None  # its host memory is taken at the first swap
        self._pool = _pool_of(np.zeros(num_blocks, np.int32))

    @property
    def num_free(self) -> int:
        """Host blocks that are free."""
        return 0 if self._pool is None else self._pool.num_free

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
            out[wanted >= 0] = self._pool.allocate(count)
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
            self._pool.free(ids)

    def block_size_change(self, config: KVCacheConfig) -> BlockSizeChange:
        """What becomes of the blocks if they are those of ``config``, row ``g * n + i`` group g of request i of n.

        Raises:
            OutOfBlocksError: what is held takes more blocks than there would be.
        """
        requests, groups = list(self.requests.values()), len(config.groups)
        width = max([1, *(each.host_blocks.shape[1] for each in requests)])
        tables = np.full((groups, len(requests), width), -1, np.int32)
        for i, each in enumerate(requests):
            tables[:, i, : each.host_blocks.shape[1]] = each.host_blocks
        return change_block_size(
            tables.reshape(-1, width),
            np.tile(np.array([each.num_tokens for each in requests], np.int64), groups),
            np.zeros(0, np.int32) if self._pool is None else self._pool.ref_counts(),
            old_size=self._config.block_size,
            new_size=config.block_size,
            page_size=config.page_size,
            num_blocks=self._num_pages // config.pages_per_block,
            width=config.table_config().max_num_blocks_per_req,
            num_groups=groups,
        )

    def change_block_size(self, config: KVCacheConfig, change: BlockSizeChange, hasher: BlockHasher) -> None:
        """Carry out ``block_size_change``; blocks of tokens that are known have the keys of ``hasher`` then."""
        tables = change.tables.reshape(len(config.groups), len(self.requests), change.tables.shape[1])
        for i, (request_id, swapped) in enumerate(list(self.requests.items())):
            record = None if swapped.record is None else swapped.record.rehashed(hasher)
            host_blocks = tables[:, i, : -(-swapped.num_tokens // config.block_size)]
            self.requests[request_id] = dataclasses.replace(swapped, host_blocks=host_blocks, record=record)
        self._config, self.num_blocks = config, len(change.ref_counts)
        self._pool = _pool_of(change.ref_counts)
        if self._transfer is not None:
            self._transfer.change_block_size(config, change.copy_src, change.copy_dst)

    def copy_out(self, pages: KVPages, blocks: np.ndarray, host_blocks: np.ndarray) -> None:
        """Copy ``blocks`` i32[n] of ``pages`` into ``host_blocks`` i32[n]; asynchronous."""
        if self._transfer is None:
            nothing = np.zeros(0, np.int32)  # all pages are taken, also those that make no whole block now
            self._transfer = KVCacheTransfer(self._config.with_block_size(self._config.page_size), self._num_pages)
            self._transfer.change_block_size(self._config, nothing, nothing)
        self._transfer.swap_out(pages, blocks, host_blocks)

    def copy_in(self, pages: KVPages, host_blocks: np.ndarray, blocks: np.ndarray) -> KVPages:
        """The pages, donated, with ``host_blocks`` i32[n] copied into ``blocks`` i32[n]; asynchronous."""
        assert self._transfer is not None
        return self._transfer.swap_in(pages, host_blocks, blocks)


def _pool_of(ref_counts: np.ndarray) -> HostPool | None:
    """A pool of blocks with so many references; None: of no blocks."""
    return HostPool(len(ref_counts), ref_counts=ref_counts) if len(ref_counts) else None
