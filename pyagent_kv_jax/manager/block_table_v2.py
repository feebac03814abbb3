"""Rows of blocks, and the pool they come from, as one object: dense or sparse, with or without prediction."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer
from pyagent_kv_jax.config import BlockAllocationStrategy, BlockTableConfig
from pyagent_kv_jax.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidArgumentError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.predictive_block_allocator import PredictiveBlockAllocator
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


class BlockTableV2:
    """A block table and its pool, on the host. Thread-safe; whatever raises does so before anything changes.

    Rows are filled with given blocks (``append_row``), or with new ones for a request (``allocate_for_request``), which
    has one row, as long as it has any. For prefix caching, swapping and steps of whole batches see ``KVCacheManager``.
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
    ) -> None:
        """Empty rows, and all blocks free.

        Args:
            config: of the table.
            use_sparse: a ``SparseBlockTable``, with room for as many blocks as the pool has; a block that two rows
                share takes room in both.
            use_prediction: reserve blocks ahead for requests that are expected to grow.
            num_blocks: of the pool. None: as many as all rows can hold, but at most 65,536.
            prediction_horizon: tokens to reserve for at most, for one request.
            num_nodes: that NUMA_AWARE knows; divides ``num_blocks``.

        Raises:
            ConfigError: not a count of blocks, more than slots in int32 can name, or nodes that do not divide it.
            InvalidArgumentError: a horizon that is none.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        if num_blocks is None:
            num_blocks = min(config.max_num_reqs * config.max_num_blocks_per_req, MOST_BLOCKS)
        self._allocator = PredictiveBlockAllocator(
            num_blocks, config.block_size, prediction_horizon, num_nodes=num_nodes
        )
        self._rows = HostTable(config, num_blocks if use_sparse else None)
        if num_blocks > (most := self._rows.methods.max_block_id + 1):
            raise ConfigError(f"num_blocks: got {num_blocks}, want at most {most}, so that slots fit int32")
        self._use_prediction = use_prediction
        self._lock = threading.Lock()
        self._row_of: dict[str, int] = {}
        self._request_of: dict[int, str] = {}
        self._num_allocations = self._num_frees = 0

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
            node: of NUMA_AWARE.

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
            tokens = self._room_after(row, count) if num_tokens is None else int(integer("num_tokens", num_tokens))
            self._rows.check_extend(row, count, tokens)
            ids = self._allocator.allocate(request_id, count, self._use_prediction, strategy=strategy, node=node)
            self._append(row, ids, tokens)
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
            )

    # -- inside ------------------------------------------------------------------------------------------------

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
