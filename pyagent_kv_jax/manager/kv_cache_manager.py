"""``KVCacheManager``: request ids, callbacks and a lock around one pool and one table.

The pool and the table are pytrees on the host's XLA CPU device; every public call is one jitted dispatch over them,
donated under the lock. The manager adds what arrays cannot hold (ids, callbacks), and no second record of who owns
which block.
"""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import DeviceType, DType, KVCacheConfig
from pyagent_kv_jax.errors import (
    CallbackError,
    DuplicateRequestError,
    InvalidArgumentError,
    OutOfBlocksError,
    RequestTooLongError,
    TooManyRequestsError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.control_plane import ControlPlane
from pyagent_kv_jax.manager.step_plan import MemoryPressure, StepPlan

PressureCallback = Callable[[MemoryPressure], None]


class KVCacheManager:
    """Hands out blocks of a paged KV cache to requests named by strings. Thread-safe.

    >>> manager = KVCacheManager(KVCacheConfig(num_layers=2, num_heads=2, head_dim=8, num_blocks=64))
    >>> manager.allocate("a", 40)                           # three blocks of 16 tokens
    >>> plan = manager.step(["a", "b"], [1, 100], num_tokens=128)   # one decode token, one prefill, one dispatch

    Source: behaves as the manager of vLLM v1 (Kwon et al., SOSP 2023) where that has one, with a whole scheduler step
    in one call.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        """Build an empty pool; the pages are made when first asked for.

        Raises:
            DeviceUnavailableError: the host's XLA CPU device is hidden (``JAX_PLATFORMS``).
        """
        self.config = config
        self._lock = threading.RLock()
        self._control = ControlPlane(config)
        self._rows: dict[str, int] = {}
        self._unused_rows = list(range(config.max_num_reqs - 1, -1, -1))
        self._pressure_callbacks: list[PressureCallback] = []
        self._pages: KVPages | None = None

    # -- the pages ---------------------------------------------------------------------------------------------

    @property
    def pages(self) -> KVPages:
        """K and V on the accelerator, made at first use. Assign the new ones back after a step that donated them."""
        with self._lock:
            if self._pages is None:
                self._pages = KVPages.create(self.config)
            return self._pages

    @pages.setter
    def pages(self, pages: KVPages) -> None:
        with self._lock:
            self._pages = pages

    # -- one scheduler step ------------------------------------------------------------------------------------

    def step(
        self,
        request_ids: Sequence[str],
        num_new_tokens: ArrayLike,
        *,
        free: Iterable[str] = (),
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> StepPlan:
        """Free, admit, append and compute slots for a whole batch, in one dispatch.

        Requests in ``free`` give everything back first. Then each request, in the order given, gets the blocks its new
        tokens need or nothing at all; once one does not fit, later ones that need blocks are refused too. An id seen
        for the first time is a new request; if it is refused it is forgotten again.

        Args:
            request_ids: n distinct ids, most urgent first.
            num_new_tokens: n counts of at least 0.
            free: ids to let go; none of them in ``request_ids``.
            num_rows: pad the batch to this many rows, so that shapes stay the same from step to step. None: n.
            num_tokens: pad to this many tokens. None: decode layout, token i belongs to row i, at most one each.

        Raises:
            UnknownRequestError: an id in ``free`` holds nothing.
            DuplicateRequestError: an id named twice.
            InvalidArgumentError: a count that is negative or not an integer, or more rows or tokens than the padding.
            RequestTooLongError: a request that would outgrow its row, or the whole pool.
            TooManyRequestsError: no row of the table is left for a new request.
        """
        ids, freed = tuple(request_ids), tuple(free)
        counts = _counts(num_new_tokens, len(ids))
        padded_rows = len(ids) if num_rows is None else num_rows
        _check_padding(counts, padded_rows, num_tokens)
        with self._lock:
            _check_distinct(ids + freed)
            freed_rows = [self._row_of(request_id) for request_id in freed]
            rows, new = self._rows_for(ids, freed_rows)
            self._check_lengths(ids, rows, counts)
            metadata = self._control.step(rows, counts, freed_rows, padded_rows, num_tokens)
            ok = np.asarray(metadata.ok)[: len(ids)]
            self._forget(freed)
            self._remember(ids, rows, new, ok)
        errors = () if ok.all() else self._trigger_memory_pressure(ids, counts, ok)
        return StepPlan(ids, ok, np.where(ok, counts, 0).astype(np.int32), metadata, errors)

    # -- one request -------------------------------------------------------------------------------------------

    def allocate(self, request_id: str, num_tokens: int) -> list[int]:
        """Admit a new request of ``num_tokens`` tokens and return its block ids.

        Raises:
            DuplicateRequestError: ``request_id`` is already here.
            OutOfBlocksError: too few free blocks, also after the memory-pressure callbacks had their turn.
            CallbackError: it did not fit, and a memory-pressure callback raised.
            InvalidArgumentError, RequestTooLongError, TooManyRequestsError: as ``step``.
        """
        with self._lock:
            if request_id in self._rows:
                raise DuplicateRequestError(f"request {request_id!r}: is already allocated, want a new id or extend()")
            self._admit_one(request_id, num_tokens)
            return self.get_block_table(request_id)

    def extend(self, request_id: str, additional_tokens: int) -> list[int]:
        """Make room for ``additional_tokens`` more and return all block ids of the request.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
            OutOfBlocksError, CallbackError, InvalidArgumentError, RequestTooLongError: as ``allocate``.
        """
        with self._lock:
            self._row_of(request_id)
            self._admit_one(request_id, additional_tokens)
            return self.get_block_table(request_id)

    def free(self, request_id: str) -> None:
        """Drop the request's references; blocks nobody else holds are free again.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here (also when it is freed a second time).
        """
        with self._lock:
            self._control.free([self._row_of(request_id)])
            self._forget((request_id,))

    # -- reading -----------------------------------------------------------------------------------------------

    def get_block_table(self, request_id: str, layer_idx: int = 0) -> list[int]:
        """Block ids of a request, first token's block first.

        Args:
            request_id: of a request that is here.
            layer_idx: selects the layer's group; a block spans all layers of its group.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
            InvalidArgumentError: no such layer.
        """
        if not 0 <= layer_idx < self.config.num_layers:
            raise InvalidArgumentError(f"layer_idx: got {layer_idx}, want 0 to {self.config.num_layers - 1}")
        with self._lock:
            return self._control.blocks_of(self._row_of(request_id))

    def num_tokens(self, request_id: str) -> int:
        """Tokens the request holds.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
        """
        with self._lock:
            return int(self._control.lengths()[self._row_of(request_id)])

    def request_ids(self) -> list[str]:
        """Ids of all requests that are here, in the order they came."""
        with self._lock:
            return list(self._rows)

    def get_num_free_blocks(self) -> int:
        """Blocks that an admission could take now."""
        with self._lock:
            return self._control.num_free()

    def usage(self) -> float:
        """Share of the pool's blocks that requests hold, 0.0 to 1.0."""
        return 1.0 - self.get_num_free_blocks() / self.config.pool_blocks

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether a new request of ``num_tokens`` would be admitted now.

        Raises:
            InvalidArgumentError: ``num_tokens`` is negative or not an integer.
        """
        tokens = int(_counts([num_tokens], 1)[0])
        with self._lock:
            fits_row = tokens <= self.config.max_model_len
            return bool(self._unused_rows) and fits_row and self._blocks_for(tokens) <= self._control.num_free()

    def check_invariants(self) -> None:
        """Check pool and table against each other; costs O(pool).

        Raises:
            InvalidBlockError: they contradict themselves or each other; the message lists where.
        """
        with self._lock:
            self._control.check_invariants()

    # -- memory pressure ---------------------------------------------------------------------------------------

    def on_memory_pressure(self, callback: PressureCallback) -> None:
        """Call ``callback(MemoryPressure)`` whenever a request is refused for lack of blocks.

        It runs after the step is complete, in the caller's thread, and may call this manager (to free something, say).
        ``allocate`` and ``extend`` try once more after it. What it raises never disturbs a step: ``step`` reports it
        in ``StepPlan.callback_errors``.
        """
        with self._lock:
            self._pressure_callbacks.append(callback)

    def _trigger_memory_pressure(
        self, ids: Sequence[str], counts: np.ndarray, ok: np.ndarray
    ) -> tuple[CallbackError, ...]:
        with self._lock:
            callbacks = tuple(self._pressure_callbacks)
            if not callbacks:
                return ()
            lengths, free = self._control.lengths(), self._control.num_free()
            refused = {i: int(n) for i, n, served in zip(ids, counts, ok, strict=True) if not served}
            held = {i: int(lengths[self._rows[i]]) if i in self._rows else 0 for i in refused}
        needed = sum(self._blocks_for(held[i] + n) - self._blocks_for(held[i]) for i, n in refused.items())
        pressure = MemoryPressure(tuple(refused), needed, free)
        errors = []
        for callback in callbacks:
            try:
                callback(pressure)
            except Exception as cause:
                error = CallbackError(f"memory-pressure callback {callback!r} raised {cause!r}")
                error.__cause__ = cause
                errors.append(error)
        return tuple(errors)

    # -- inside ------------------------------------------------------------------------------------------------

    def _admit_one(self, request_id: str, num_tokens: int) -> None:
        """Admit or extend one request; give pressure callbacks one chance to make room."""
        counts = _counts([num_tokens], 1)
        for attempt in range(2):
            rows, new = self._rows_for((request_id,), [])
            self._check_lengths((request_id,), rows, counts)
            ok = np.array([self._control.admit(int(rows[0]), int(counts[0]))])
            if ok.all():
                self._remember((request_id,), rows, new, ok)
                return
            if attempt == 0:
                for error in self._trigger_memory_pressure((request_id,), counts, ok):
                    raise error
        raise OutOfBlocksError(
            f"request {request_id!r}: {num_tokens} more tokens do not fit into {self._control.num_free()} free blocks "
            f"of {self.config.block_size} tokens (pool: {self.config.pool_blocks})"
        )

    def _rows_for(self, ids: Sequence[str], freed_rows: Sequence[int]) -> tuple[np.ndarray, list[str]]:
        """Rows i32[n] of ``ids``, new ones taken from the unused and the about-to-be-freed; nothing changes yet."""
        new = [request_id for request_id in ids if request_id not in self._rows]
        unused = [*freed_rows, *self._unused_rows]
        if len(new) > len(unused):
            raise TooManyRequestsError(
                f"{len(new)} new requests with {len(unused)} of {self.config.max_num_reqs} rows unused: "
                f"free some, or raise max_num_reqs"
            )
        taken = dict(zip(new, reversed(unused), strict=False))
        return np.array([self._rows.get(i, taken.get(i, -1)) for i in ids], np.int32), new

    def _remember(self, ids: Sequence[str], rows: np.ndarray, new: Sequence[str], ok: np.ndarray) -> None:
        if new:
            served = {i: int(row) for i, row, granted in zip(ids, rows, ok, strict=True) if granted}
            taken = {i: served[i] for i in new if i in served}
            self._rows.update(taken)
            rows_taken = set(taken.values())
            self._unused_rows = [row for row in self._unused_rows if row not in rows_taken]

    def _forget(self, ids: Sequence[str]) -> None:
        self._unused_rows.extend(self._rows.pop(request_id) for request_id in ids)

    def _row_of(self, request_id: str) -> int:
        try:
            return self._rows[request_id]
        except (KeyError, TypeError):
            raise UnknownRequestError(
                f"request {request_id!r}: unknown, want one of the {len(self._rows)} that hold blocks"
            ) from None

    def _check_lengths(self, ids: Sequence[str], rows: np.ndarray, counts: np.ndarray) -> None:
        new = np.array([request_id not in self._rows for request_id in ids], bool)
        totals = np.where(new, 0, self._control.lengths()[rows]) + counts
        limit = min(self.config.max_model_len, self.config.pool_blocks * self.config.block_size)
        if (totals > limit).any():
            worst = int(totals.argmax())
            raise RequestTooLongError(
                f"request {ids[worst]!r}: would hold {totals[worst]} tokens, want at most {limit} "
                f"(max_model_len {self.config.max_model_len}, pool {self.config.pool_blocks} blocks of "
                f"{self.config.block_size})"
            )

    def _blocks_for(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.config.block_size)


def create_kv_cache_manager(
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_blocks: int | None = None,
    block_size: int = 16,
    *,
    dtype: DType | None = None,
    device: DeviceType | None = None,
    max_num_reqs: int = 256,
    max_model_len: int = 4096,
) -> KVCacheManager:
    """A manager in one line. See ``KVCacheConfig`` for the arguments and the errors."""
    return KVCacheManager(
        KVCacheConfig(
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=device,
            max_num_reqs=max_num_reqs,
            max_model_len=max_model_len,
        )
    )


def _counts(values: ArrayLike, n: int) -> np.ndarray:
    """``values`` as i64[n] counts.

    Raises:
        InvalidArgumentError: negative, not integers, or not n of them.
    """
    array = np.asarray(values)
    if array.size == 0 and n == 0:
        return np.zeros(0, np.int64)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise InvalidArgumentError(f"token counts: got {_shown(values)}, want {n} integers of at least 0")
    if (array < 0).any():
        raise InvalidArgumentError(f"token counts: got {array[array < 0][0]}, want integers of at least 0")
    return array.astype(np.int64)


def _shown(values: object) -> str:
    return repr(values) if isinstance(values, numbers.Number) else repr(values)[:80]


def _check_distinct(ids: Sequence[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(request_id for request_id in ids if ids.count(request_id) > 1)
        raise DuplicateRequestError(f"request {twice!r}: named twice in one step, want each id once")


def _check_padding(counts: np.ndarray, num_rows: int, num_tokens: int | None) -> None:
    if len(counts) > num_rows:
        raise InvalidArgumentError(f"num_rows: got {num_rows} for {len(counts)} requests, want at least as many")
    if num_tokens is None and (counts > 1).any():
        raise InvalidArgumentError(
            f"num_new_tokens: got {counts.max()} in decode layout, want at most 1 a request, or num_tokens=..."
        )
    if num_tokens is not None and counts.sum() > num_tokens:
        raise InvalidArgumentError(f"num_tokens: got {num_tokens} for {counts.sum()} tokens, want at least as many")
