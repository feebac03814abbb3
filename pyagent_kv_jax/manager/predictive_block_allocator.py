"""Blocks for requests named by strings, some of them reserved before they are asked for."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
from numpy.typing import ArrayLike

from pyagent_kv_jax.arguments import integer, integers
from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    InvalidBlockError,
    OutOfBlocksError,
    ShapeMismatchError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.growth_predictor import GrowthPredictor
from pyagent_kv_jax.pool.host_blocks import HostBlocks
from pyagent_kv_jax.pool.host_pool import HostPool

_NONE = np.zeros(0, np.int32)
_AHEAD = (None, BlockAllocationStrategy.PREDICTIVE, BlockAllocationStrategy.SCATTERED)


@dataclasses.dataclass
class _Request:
    """What a request has.

    Attributes:
        name: its id.
        held: references to blocks it was given and that were not dropped.
        growth: blocks it asked for after its first call.
        calls: so far.
        reserved: i32[n], blocks that will be its own when it asks; they count as free.
    """

    name: str
    held: int = 0
    growth: int = 0
    calls: int = 0
    reserved: np.ndarray = dataclasses.field(default_factory=lambda: _NONE)


class PredictiveBlockAllocator:
    """Hands out blocks of one pool, and reserves ahead for requests that are expected to go on growing.

    How far a request will grow is learned from those that have ended: of those that got as far, half went on by at
    least what is reserved (``GrowthPredictor``). Where too few got as far, it is reserved as much as the request itself
    has grown so far. A call that finds what it wants in reserve does not touch the pool. Reserved blocks count as free,
    and are given back before anybody is refused, and when their request ends. Thread-safe.

    Attributes:
        prediction_hits: blocks that were asked for, and had been reserved.
        prediction_misses: blocks that requests asked for in later calls than their first, and had not been.
        round_trips: calls of the pool that allocations took.
    """

    def __init__(
        self,
        total_blocks: int,
        block_size: int = 16,
        prediction_horizon: int = 64,
        *,
        num_nodes: int = 1,
        pool: HostBlocks | None = None,
    ) -> None:
        """All blocks free.

        Args:
            total_blocks: N.
            block_size: tokens of a block.
            prediction_horizon: tokens that are reserved for at most, for one request; 0: none.
            num_nodes: that NUMA_AWARE knows; divides N.
            pool: of N blocks, all free, whose owner this becomes. None: one of ``num_nodes`` nodes.

        Raises:
            ConfigError: not a count of blocks, or nodes that do not divide it.
            InvalidArgumentError: a block size or horizon that is none.
        """
        for name, value, least in (("block_size", block_size, 1), ("prediction_horizon", prediction_horizon, 0)):
            if int(integer(name, value)) < least:
                raise InvalidArgumentError(f"{name}: got {value}, want at least {least}")
        self._horizon = -(-prediction_horizon // block_size)
        self._pool = HostPool(total_blocks, num_nodes) if pool is None else pool
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}
        self._holders: dict[int, list[_Request | None]] = {}  # of each block, one for each reference; None: nobody
        self._predictor = GrowthPredictor()
        self.prediction_hits = self.prediction_misses = self.round_trips = 0

    def allocate(
        self,
        request_id: str,
        num_blocks: int,
        predict_future: bool = True,
        *,
        strategy: BlockAllocationStrategy | None = None,
        node: int | None = None,
    ) -> np.ndarray:
        """``num_blocks`` more blocks for a request, each with one reference.

        Args:
            request_id: a new one, or one that has blocks already.
            num_blocks: at least 0.
            predict_future: reserve ahead as well, where blocks are left after this.
            strategy: which blocks, in this call. None, SCATTERED: those in reserve, then in the pool's own order.
                PREDICTIVE: the same, and reserve ahead whatever ``predict_future`` says. CONTIGUOUS, NUMA_AWARE: from
                the pool alone; nothing is reserved.
            node: of NUMA_AWARE; of a pool that ``knows_nodes``, also where blocks that are not in reserve come from.

        Returns:
            i32[num_blocks].

        Raises:
            OutOfBlocksError: fewer are free, the reserves of all requests included, or no run is as long; the message
                says how many are free, and how long the longest run is.
            InvalidArgumentError: a negative count, or a strategy or node that the pool cannot serve.
        """
        count = int(integer("num_blocks", num_blocks))
        if count < 0:
            raise InvalidArgumentError(f"num_blocks: got {count}, want 0 or more")
        policy, ahead = strategy or BlockAllocationStrategy.SCATTERED, strategy in _AHEAD
        if ahead and node is not None and not self._pool.knows_nodes:
            raise InvalidArgumentError(f"node: got {node!r} with '{policy}', want one with 'numa_aware' only")
        with self._lock:
            request = self._requests.get(request_id, _Request(request_id))
            if ahead:
                predicts = predict_future or policy == BlockAllocationStrategy.PREDICTIVE
                ids = self._allocate_ahead(request, count, predicts, node)
            else:
                ids = self._allocate_by(policy, node, count)
            self._requests[request_id] = request
            request.held += count
            request.growth += count if request.calls else 0
            request.calls += 1
            self._note_holder(ids, request)
        return ids

    def free(self, block_ids: ArrayLike) -> None:
        """Drop one reference to each block i32[n]. A request none of whose blocks are left has ended.

        Raises:
            InvalidBlockError: an id outside the pool, or not an integer.
            DoubleFreeError: fewer references than are dropped.
        """
        ids = _ids(block_ids)
        with self._lock:
            if (taken := ids[np.isin(ids, self._reserved())]).size:
                raise InvalidBlockError(f"blocks: got {taken[:20].tolist()}, which are in reserve, want blocks given")
            self._pool.free(ids)
            for block in ids.tolist():
                request = self._holders[block].pop()  # the last to come is taken to be the first to go
                if request is not None:
                    request.held -= 1
                    if not request.held and self._requests.get(request.name) is request:
                        self._end(request)

    def acquire(self, block_ids: ArrayLike) -> None:
        """One more reference to each of these very blocks i32[n], free or in use, for nobody in particular.

        A block that is in reserve is one that is free.

        Raises:
            InvalidBlockError: an id outside the pool, or not an integer.
        """
        ids = _ids(block_ids)
        with self._lock:
            self._pool.check_inside(ids)
            for request in self._requests.values():
                wanted = np.isin(request.reserved, ids)
                self._pool.free(request.reserved[wanted])
                request.reserved = request.reserved[~wanted]
            self._pool.take(ids)
            self._note_holder(ids, None)

    def finish(self, request_id: str) -> None:
        """The request will not ask again: what it has in reserve is given back. Its blocks are not freed.

        Raises:
            UnknownRequestError: it has no blocks here.
        """
        with self._lock:
            if request_id not in self._requests:
                raise UnknownRequestError(f"request {request_id!r}: want one of the {len(self._requests)} with blocks")
            self._end(self._requests[request_id])

    def get_num_free(self) -> int:
        """Free blocks, those in reserve included."""
        with self._lock:
            return self._num_free()

    @property
    def reserved(self) -> np.ndarray:
        """Blocks in reserve, i32[n]."""
        with self._lock:
            return self._reserved()

    @property
    def num_reserved(self) -> int:
        """Blocks in reserve."""
        with self._lock:
            return self._num_reserved()

    @property
    def total_blocks(self) -> int:
        """N."""
        return self._pool.num_blocks

    # -- inside ------------------------------------------------------------------------------------------------

    def _allocate_ahead(self, request: _Request, count: int, predicts: bool, node: int | None) -> np.ndarray:
        found = min(count, len(request.reserved))
        missing = count - found
        if missing:
            if missing > self._num_free() - len(request.reserved):
                raise OutOfBlocksError(
                    f"got a request for {count} blocks, want at most the {self._num_free()} free, reserves included"
                )
            ahead = self._predict_future_need(request.name, count) if predicts else 0
            if missing + ahead > self._pool.num_free:
                ahead = 0
            if missing > self._pool.num_free:
                self._give_back_all(but=request)
            fresh = self._pool.allocate(missing + ahead, node=node)
            self.round_trips += 1
        else:
            fresh = _NONE
        if request.calls:
            self.prediction_hits += found
            self.prediction_misses += missing
        ids = np.concatenate([request.reserved[:found], fresh[:missing]])
        request.reserved = np.concatenate([request.reserved[found:], fresh[missing:]])
        return ids

    def _allocate_by(self, strategy: BlockAllocationStrategy, node: int | None, count: int) -> np.ndarray:
        self.round_trips += 1
        try:
            return self._pool.allocate(count, strategy, node)
        except OutOfBlocksError:
            if not self._num_reserved():
                raise
        reserved = [(request, request.reserved) for request in self._requests.values()]
        self._give_back_all()
        try:
            return self._pool.allocate(count, strategy, node)
        except OutOfBlocksError:  # nobody is served, so nobody loses a reserve
            for request, ids in reserved:
                request.reserved = ids
                self._pool.take(ids)
            raise

    def _predict_future_need(self, request_id: str, count: int = 0) -> int:
        """Blocks to reserve for a request that now gets ``count``."""
        request = self._requests.get(request_id)
        growth = 0 if request is None else request.growth + count
        remaining = float(self._predictor.remaining(np.array([growth]))[0])
        return int(min(remaining if np.isfinite(remaining) else growth, self._horizon))

    def _give_back_all(self, but: _Request | None = None) -> None:
        for request in self._requests.values():
            if request is not but:
                self._pool.free(request.reserved)
                request.reserved = _NONE

    def _end(self, request: _Request) -> None:
        del self._requests[request.name]
        self._pool.free(request.reserved)
        self._predictor.learn(request.growth)

    def _note_holder(self, ids: np.ndarray, holder: _Request | None) -> None:
        for block in ids.tolist():
            self._holders.setdefault(block, []).append(holder)

    def _reserved(self) -> np.ndarray:
        return np.concatenate([_NONE, *(request.reserved for request in self._requests.values())])

    def _num_reserved(self) -> int:
        return sum(len(request.reserved) for request in self._requests.values())

    def _num_free(self) -> int:
        return self._pool.num_free + self._num_reserved()


def _ids(block_ids: ArrayLike) -> np.ndarray:
    try:
        ids: np.ndarray = integers("block_ids", np.atleast_1d(np.asarray(block_ids)))
    except (ShapeMismatchError, InvalidArgumentError) as error:
        raise InvalidBlockError(str(error)) from None
    return ids
