"""Blocks moved between device and host, by id or by view: a thin object that holds the host's pages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pyagent_kv_jax.cache.block_views import KVCacheBlock
from pyagent_kv_jax.cache.host_pages import HostPages, checked_pairs, regrouped, swap_in, swap_out
from pyagent_kv_jax.cache.kv_pages import KVPages, copy_blocks_in_place
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import InvalidBlockError
from pyagent_kv_jax.tables.padding import padded

BlockIds = int | KVCacheBlock | Sequence[int | KVCacheBlock] | np.ndarray | jax.Array
"""One block or several: an id, a view, a list of either, or i32[n]; -1 is padding, and its pair is left out."""


class KVCacheTransfer:
    """Copies blocks out to the host, back in, and from block to block on the device.

    All blocks of a call move together, dispatched without waiting for them. Calls may come from any thread, and take
    effect one after another. What moves is what the pages held when they were passed: order comes from the values.
    """

    def __init__(self, config: KVCacheConfig, num_host_blocks: int) -> None:
        """Takes ``num_host_blocks * config.block_size_bytes()`` bytes of pinned host memory.

        Raises:
            ConfigError: ``num_host_blocks`` is not a positive integer.
            DeviceUnavailableError: no such device here, or one without pinned host memory.
        """
        self.config = config
        self._host = HostPages.create(config, num_host_blocks)
        self._lock = threading.Lock()

    @property
    def host(self) -> HostPages:
        """The host's pages as they are now; the next ``swap_out`` invalidates them."""
        return self._host

    def change_block_size(self, config: KVCacheConfig, src_pages: np.ndarray, dst_pages: np.ndarray) -> None:
        """Blocks are those of ``config`` from now on; within the host's pool pages i32[n] are copied, all at once.

        Which pages is what ``cache.block_size_change`` says of the tables over the host's blocks.
        """
        with self._lock:
            self.config = config
            self._host = regrouped(self._host, src_pages, dst_pages, config.pages_per_block)

    def swap_out(self, pages: KVPages, gpu_block: BlockIds, cpu_block: BlockIds) -> None:
        """Copy blocks ``gpu_block`` of ``pages`` to blocks ``cpu_block`` of the host. ``pages`` stay valid.

        Raises:
            InvalidBlockError: an id outside its pool, a view of the other pool, or a destination named twice.
            ShapeMismatchError: not as many ids of the one as of the other, or pages of another geometry.
        """
        gpu, cpu = _ids("gpu_block", gpu_block, on_host=False), _ids("cpu_block", cpu_block, on_host=True)
        with self._lock:
            self._host = swap_out(pages, self._host, gpu, cpu)

    def swap_in(self, pages: KVPages, cpu_block: BlockIds, gpu_block: BlockIds) -> KVPages:
        """Copy blocks ``cpu_block`` of the host to blocks ``gpu_block`` of ``pages``: donated, so use the result.

        Raises:
            InvalidBlockError: as ``swap_out``; ``pages`` are still valid then.
            ShapeMismatchError: likewise.
        """
        cpu, gpu = _ids("cpu_block", cpu_block, on_host=True), _ids("gpu_block", gpu_block, on_host=False)
        with self._lock:
            return swap_in(self._host, pages, cpu, gpu)

    def copy_blocks(self, pages: KVPages, src_blocks: BlockIds, dst_blocks: BlockIds) -> KVPages:
        """Copy blocks within ``pages``, which are donated, as if all reads came before all writes: use the result.

        Raises:
            InvalidBlockError: as ``swap_out``; ``pages`` are still valid then.
            ShapeMismatchError: not as many ids of the one as of the other.
        """
        size = pages.config.pool_blocks
        src, dst = (
            (name, _ids(name, blocks, on_host=False), size)
            for name, blocks in (("src_blocks", src_blocks), ("dst_blocks", dst_blocks))
        )
        src_ids, dst_ids = checked_pairs(src, dst)
        return copy_blocks_in_place(pages, padded(src_ids), padded(dst_ids)) if len(src_ids) else pages


def _ids(name: str, blocks: BlockIds, *, on_host: bool) -> np.ndarray:
    """[n], unchecked but for the pool of views."""
    if isinstance(blocks, KVCacheBlock):
        blocks = [blocks]
    ids: Any = blocks
    if isinstance(blocks, list | tuple):
        wrong = [b for b in blocks if isinstance(b, KVCacheBlock) and b.on_host != on_host]
        if wrong:
            got, want = ("device's", "host's") if on_host else ("host's", "device's")
            raise InvalidBlockError(f"{name}: got the {got} blocks {[b.block_id for b in wrong]}, want the {want}")
        ids = [b.block_id if isinstance(b, KVCacheBlock) else b for b in blocks]
    ids = np.asarray(ids)
    return ids[None] if ids.ndim == 0 else ids
