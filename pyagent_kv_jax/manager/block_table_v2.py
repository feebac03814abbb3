"""Rows of blocks, and the pool they come from: dense or sparse, with or without prediction, on one device or many."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer, integers
from pyagent_kv_jax.config import BlockAllocationStrategy, BlockTableConfig
from pyagent_kv_jax.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidArgumentError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.device_pools import DevicePools
from pyagent_kv_jax.manager.predictive_block_allocator import PredictiveBlockAllocator
from pyagent_kv_jax.pool.host_blocks import HostBlocks
from pyagent_kv_jax.pool.host_pool import HostPool
from pyagent_kv_jax.tables import BlockTable, SlotMapping, SparseBlockTable
from pyagent_kv_jax.tables.host_table import HostTable

MOST_BLOCKS = 65_536
"""Blocks of the pool, at most, where nobody says how many."""


@dataclasses.dataclass(frozen=True)
class BlockTableStats:
    """A snapshot of ``BlockTableV2``.

    Attributes:
        num_blocks: of the pool.
        num_free_blocks: of those, the ones in reserve included.
        num_used_blocks: of those.
        num_reserved_blocks: free blocks that stand ready for the requests they were reserved for.
        num_requests: that have a row.
        num_allocations: blocks that rows were given or came to share, so far.
        num_frees: blocks that rows gave back, so far.
        num_empty_slots: slots of the rows' blocks without a token; those of a block of two rows count in each.
        empty_slot_share: those by all slots of the rows' blocks; 0.0 if there are none.
        num_prediction_hits: blocks that were asked for and had been reserved, so far.
        num_prediction_misses: blocks that requests came back for and had not been reserved, so far.
        table_bytes: of the table.
        num_used_by_device: blocks in use of each device of the mesh axis; () without a mesh.
        num_spilled: blocks given, so far, on another device than the one that was to come first; 0 without a mesh.
    """

    num_blocks: int
    num_free_blocks: int
    num_used_blocks: int
    num_reserved_blocks: int
    num_requests: int
    num_allocations: int
    num_frees: int
    num_empty_slots: int
    empty_slot_share: float
    num_prediction_hits: int
    num_prediction_misses: int
    table_bytes: int
    num_used_by_device: tuple[int, ...]
    num_spilled: int


class BlockTableV2:
    """A block table and its pool, on the host. Thread-safe; whatever raises does so before anything changes.

    Rows are filled with given blocks (``append_row``), or with new ones for a request (``allocate_for_request``), which
    has one row, as long as it has any. For prefix caching, swapping and steps of whole batches see ``KVCacheManager``.

    With a mesh, blocks live on the devices of one of its axes: of N, device d of D has ids ``d * N / D`` to
    ``(d + 1) * N / D - 1``, as ``OwnedKVPages`` stores them. A new block comes from the device of the row's last one
    (of an empty row: from the one that has most free), and where that has none left, from others by the rule of
    ``plan_spill``. Table and pools stay on the host all the same. A ``DistributedBlockTable`` holds them on the mesh,
    for steps inside ``jit``, where devices must ask each other what is free; here one call comes after another, and a
    collective for each would tell the host what it knows. So sparse tables, prediction and given blocks go with a mesh
    as they go without. Where several processes share the mesh, each makes the same calls, and comes to the same ids.
    """

    def __init__(
        self,
        config: BlockTableConfig,
        use_sparse: bool = False,
        use_prediction: bool = False,
        *,
        num_blocks: int | None = None,
        prediction_horizon: int = 64,
        num_nodes: int = 1,
        mesh: Mesh | None = None,
        axis: str = "workers",
    ) -> None:
        """Empty rows, and all blocks free.

        Args:
            config: of the table.
            use_sparse: a ``SparseBlockTable``, with room for as many blocks as the pool has; a block that two rows
                share takes room in both.
            use_prediction: reserve blocks ahead for requests that are expected to grow.
            num_blocks: of the pool, on all devices together. None: as many as all rows can hold, but at most 65,536;
                with a mesh, a multiple of its devices.
            prediction_horizon: tokens to reserve for at most, for one request.
            num_nodes: that NUMA_AWARE knows; divides ``num_blocks``.
            mesh: over whose devices blocks are spread. None: blocks are all in one place.
            axis: name of its axis of D devices, each of them a node.

        Raises:
            ConfigError: not a count of blocks, more than slots in int32 can name, nodes or devices that do not divide
                it, a mesh without such an axis, or with nodes besides.
            InvalidArgumentError: a horizon that is none.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        devices = 1 if mesh is None else _devices(mesh, axis, num_nodes)
        if num_blocks is None:
            num_blocks = min(config.max_num_reqs * config.max_num_blocks_per_req, MOST_BLOCKS)
            num_blocks = max(num_blocks // devices, 1) * devices
        self._pool: HostBlocks = HostPool(num_blocks, num_nodes) if mesh is None else DevicePools(num_blocks, devices)
        self._allocator = PredictiveBlockAllocator(num_blocks, config.block_size, prediction_horizon, pool=self._pool)
        self._rows = HostTable(config, num_blocks if use_sparse else None)
        if num_blocks > (most := self._rows.methods.max_block_id + 1):
            raise ConfigError(f"num_blocks: got {num_blocks}, want at most {most}, so that slots fit int32")
        self._use_prediction = use_prediction
        self._lock = threading.Lock()
        self._row_of: dict[str, int] = {}
        self._request_of: dict[int, str] = {}
        self._num_allocations = self._num_frees = self._num_spilled = 0

    # -- rows --------------------------------------------------------------------------------------------------

    def append_row(self, row_idx: ArrayLike, block_ids: ArrayLike, num_tokens: ArrayLike) -> None:
        """Append very blocks i32[n] to a row that gains ``num_tokens`` tokens: free ones are taken, others shared.

        Raises:
            RequestTooLongError: the row has no columns left for them.
            InvalidArgumentError: no such row, a negative count, or more tokens than the row's blocks hold.
            InvalidBlockError: an id outside the pool.
            TableFullError: a sparse table has no room for them.
        """
        with self._lock:
            row = self._row(row_idx)
            ids, tokens = self._rows.check_append(row, block_ids, num_tokens)
            self._allocator.acquire(ids)
            self._append(row, ids, tokens)

    def get_row(self, row_idx: ArrayLike) -> np.ndarray:
        """i32[W]: the row's block ids, padding -1.

        Raises:
            InvalidArgumentError: no such row.
        """
        with self._lock:
            return np.array(self._rows.methods.get_row(row_idx))

    def clear_row(self, row_idx: ArrayLike) -> None:
        """Empty a row: its references are dropped, and its request, if it has one, ends.

        Raises:
            InvalidArgumentError: no such row.
        """
        with self._lock:
            self._clear(self._row(row_idx))

    def compute_slot_mapping(self, row_idx: ArrayLike, num_tokens: int, start_position: ArrayLike) -> SlotMapping:
        """Slots of the row's tokens ``start_position .. start_position + num_tokens - 1``.

        Raises:
            InvalidArgumentError: no such row, a negative count or position, or tokens that the row does not hold.
        """
        with self._lock:
            return self._rows.methods.compute_slot_mapping(row_idx, num_tokens, start_position)

    @property
    def table(self) -> BlockTable | SparseBlockTable:
        """The table as it is now. It stays so: the next change copies it."""
        with self._lock:
            return self._rows.table

    # -- requests ----------------------------------------------------------------------------------------------

    def allocate_for_request(
        self,
        request_id: str,
        row_idx: ArrayLike,
        num_blocks: int,
        *,
        num_tokens: int | None = None,
        strategy: BlockAllocationStrategy | None = None,
        node: int | None = None,
    ) -> np.ndarray:
        """Append new blocks to the row of a request, which it makes its own by the first call.

        Args:
            request_id: a new one, or the one whose row this is.
            row_idx: a row of no other request; it may hold blocks already, such as a shared prefix.
            num_blocks: at least 0.
            num_tokens: that the row gains. None: as many as its blocks then have room for.
            strategy: which blocks; see ``PredictiveBlockAllocator.allocate``.
            node: of NUMA_AWARE; with a mesh, of all but CONTIGUOUS: the device whose blocks come first, but for those
                that are in reserve.

        Returns:
            The new blocks, i32[num_blocks].

        Raises:
            OutOfBlocksError: fewer blocks are free, those in reserve included, or no run is as long.
            RequestTooLongError: the row has no columns left for them.
            InvalidArgumentError: no such row, one of another request, a negative count, more tokens than the row's
                blocks hold, or a strategy or node that the pool cannot serve.
            DuplicateRequestError: the request has another row.
            TableFullError: a sparse table has no room for them.
        """
        with self._lock:
            row, count = self._row(row_idx), int(integer("num_blocks", num_blocks))
            self._check_owner(request_id, row)
            if count < 0:
                raise InvalidArgumentError(f"num_blocks: got {count}, want 0 or more")
            near = self._home(row, strategy) if node is None else self._checked_node(node)
            tokens = self._room_after(row, count) if num_tokens is None else int(integer("num_tokens", num_tokens))
            self._rows.check_extend(row, count, tokens)
            ids = self._allocator.allocate(request_id, count, self._use_prediction, strategy=strategy, node=near)
            self._append(row, ids, tokens)
            if near is not None and isinstance(self._pool, DevicePools):
                self._num_spilled += int((self._pool.device_of(ids) != near).sum())
            self._row_of[request_id], self._request_of[row] = row, request_id
        return ids

    def free_request(self, request_id: str) -> None:
        """Empty the request's row, as ``clear_row`` does.

        Raises:
            UnknownRequestError: it has no row.
        """
        with self._lock:
            if request_id not in self._row_of:
                raise UnknownRequestError(f"request {request_id!r}: want one of the {len(self._row_of)} with a row")
            self._clear(self._row_of[request_id])

    # -- devices -----------------------------------------------------------------------------------------------

    def get_block_location(self, block_id: ArrayLike) -> np.ndarray:
        """i32[...]: index on the mesh axis of the device that each block lives on; 0 without a mesh.

        Raises:
            InvalidBlockError: an id outside the pool.
            ShapeMismatchError: not integers.
        """
        ids = np.asarray(integers("block_id", np.ravel(block_id)))
        self._pool.check_inside(ids, "block_id")
        devices = self._pool.device_of(ids) if isinstance(self._pool, DevicePools) else np.zeros_like(ids)
        return devices.reshape(np.shape(block_id))

    def is_local(self, block_id: ArrayLike, device: int = 0) -> np.ndarray:
        """bool[...]: whether each block lives on ``device``. Raises as ``get_block_location``.

        Raises:
            InvalidArgumentError: there is no such device.
        """
        num_devices = self._pool.num_devices if isinstance(self._pool, DevicePools) else 1
        if not 0 <= int(integer("device", device)) < num_devices:
            raise InvalidArgumentError(f"device: got {device}, want 0 to {num_devices - 1}")
        return self.get_block_location(block_id) == device

    def get_stats(self) -> BlockTableStats:
        """Counts as they are now."""
        with self._lock:
            free, total = self._allocator.get_num_free(), self._allocator.total_blocks
            slots = int(self._rows.num_blocks().sum()) * self._rows.methods.config.block_size
            empty = slots - int(self._rows.num_tokens().sum())
            return BlockTableStats(
                num_blocks=total,
                num_free_blocks=free,
                num_used_blocks=total - free,
                num_reserved_blocks=self._allocator.num_reserved,
                num_requests=len(self._row_of),
                num_allocations=self._num_allocations,
                num_frees=self._num_frees,
                num_empty_slots=empty,
                empty_slot_share=empty / slots if slots else 0.0,
                num_prediction_hits=self._allocator.prediction_hits,
                num_prediction_misses=self._allocator.prediction_misses,
                table_bytes=self._rows.methods.nbytes,
                num_used_by_device=self._used_by_device(),
                num_spilled=self._num_spilled,
            )

    # -- inside ------------------------------------------------------------------------------------------------

    def _home(self, row: int, strategy: BlockAllocationStrategy | None) -> int | None:
        """The device whose blocks come first, where nobody has named one and the strategy does not say."""
        if not isinstance(self._pool, DevicePools) or strategy not in (None, BlockAllocationStrategy.PREDICTIVE):
            return None
        held = int(self._rows.num_blocks()[row])
        if not held:
            return int(self._pool.free_by_device().argmax())
        return int(self._pool.device_of(np.asarray(self._rows.methods.get_block(row, held - 1))))

    def _checked_node(self, node: int) -> int:
        if isinstance(self._pool, DevicePools) and not 0 <= int(integer("node", node)) < self._pool.num_devices:
            raise InvalidArgumentError(f"node: got {node}, want 0 to {self._pool.num_devices - 1}")
        return node

    def _used_by_device(self) -> tuple[int, ...]:
        if not isinstance(self._pool, DevicePools):
            return ()
        return tuple(self._pool.used_by_device(but=self._allocator.reserved).tolist())

    def _row(self, row_idx: ArrayLike) -> int:
        return int(self._rows.methods.check_row(row_idx))

    def _check_owner(self, request_id: str, row: int) -> None:
        owner = self._request_of.get(row, request_id)
        if owner != request_id:
            raise InvalidArgumentError(
                f"row_idx: got {row}, the row of request {owner!r}, want one of no other request"
            )
        at = self._row_of.get(request_id, row)
        if at != row:
            raise DuplicateRequestError(f"request {request_id!r}: got row {row}, want its row {at}")

    def _room_after(self, row: int, more_blocks: int) -> int:
        total = int(self._rows.num_blocks()[row]) + more_blocks
        return total * self._rows.methods.config.block_size - int(self._rows.num_tokens()[row])

    def _append(self, row: int, ids: np.ndarray, tokens: int) -> None:
        self._rows.append(row, ids, tokens)
        self._num_allocations += len(ids)

    def _clear(self, row: int) -> None:
        ids = self._rows.clear(row)
        request_id = self._request_of.pop(row, None)
        if request_id is not None:
            del self._row_of[request_id]
            self._allocator.finish(request_id)
        self._allocator.free(ids[::-1])  # tail first, so that a shared prefix is the last to be reused
        self._num_frees += len(ids)


def _devices(mesh: Mesh, axis: str, num_nodes: int) -> int:
    if axis not in mesh.axis_names:
        raise ConfigError(f"axis: got {axis!r}, want one of the mesh's axes {mesh.axis_names}")
    if num_nodes != 1:
        raise ConfigError(f"num_nodes: got {num_nodes!r} with a mesh, want 1: each device of axis {axis!r} is a node")
    return mesh.shape[axis]
