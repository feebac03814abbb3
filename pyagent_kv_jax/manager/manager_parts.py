"""The parts of a ``KVCacheManager``, what can be read from them together, and the checks before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyagent_kv_jax.cache.kv_pages import KVPages, PageMove
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    RequestTooLongError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.control_plane import ControlPlane
from pyagent_kv_jax.manager.decode_ahead import DecodeAhead
from pyagent_kv_jax.manager.manager_stats import Counts, ManagerStats
from pyagent_kv_jax.manager.memory_pressure import MemoryPressure
from pyagent_kv_jax.manager.options import ManagerOptions
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher
from pyagent_kv_jax.manager.prefix.events import EventLog
from pyagent_kv_jax.manager.prefix.known_tokens import KnownTokens, TokenRecord
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixCache, PrefixHit
from pyagent_kv_jax.manager.prefix.prefix_statistics import PrefixStatistics
from pyagent_kv_jax.manager.prefix_filling import PrefixFiller
from pyagent_kv_jax.manager.request_rows import RequestRows
from pyagent_kv_jax.manager.request_start import NO_LIMIT, Start
from pyagent_kv_jax.manager.swap_space import SwapSpace


class ManagerParts:
    """Rows, tables, pool, pages, prefix cache and swap space. Not thread-safe."""

    def __init__(self, config: KVCacheConfig, options: ManagerOptions) -> None:
        self.config = config
        self.options = options
        self.pages: KVPages | ShardedKVPages | None = None
        self.before_page_move: Callable[[PageMove, list[np.ndarray]], Any] | None = None
        self._control = ControlPlane(config, options.prediction_horizon)
        self.ahead = DecodeAhead(config, options.prediction_horizon)
        self.rows = RequestRows(config.max_num_reqs)
        self.waiting: dict[str, TokenRecord] = {}  # added, or to be computed again; they hold nothing
        self.tokens = KnownTokens(config.block_size, config.max_num_reqs)
        self.hasher = BlockHasher(config.block_size, options.hash_algorithm)
        self.prefixes = PrefixCache(
            config.pool_blocks,
            config.block_size,
            windows=[group.sliding_window for group in config.groups],
            chunks=[group.chunk_size for group in config.groups],
        )
        self.swap = SwapSpace(config, options.num_host_blocks)
        self.events = EventLog(options.event_capacity)
        self.filler = PrefixFiller(self.tokens, self.prefixes, self.events)
        self.hit_rate = PrefixStatistics(options.hit_rate_window)
        self.counts = Counts()
        self._most_tokens = config.max_request_tokens
        self._no_hit = PrefixHit(0, np.zeros((len(config.groups), 0), np.int32), None)
        self._nothing = Start(self._no_hit, 0, NO_LIMIT)
        self._expected = np.zeros(config.max_num_reqs, np.int32)  # drafts of the next step
        self._drafts = np.zeros(config.max_num_reqs, np.int32)  # computed, and not yet committed
        # Leading tokens that the row's blocks don't hold, if it has blocks for them: they were out of sight when the
        # request was swapped out, or when the block size changed.
        self._hollow = np.zeros((len(config.groups), config.max_num_reqs), np.int32)

    @property
    def control(self) -> ControlPlane:
        """The control plane, told of all that decode steps have put off."""
        if self.ahead.used.any():
            self._control.advance(self.ahead.used, self.ahead.latest)
        if self.ahead.freed_rows:
            self._control.free(self.ahead.freed_rows)
        self.ahead.settled()
        return self._control

    # -- who is here -------------------------------------------------------------------------------------------

    def holds(self, request_id: str) -> bool:
        """Whether it holds blocks, on the device or in host memory."""
        return request_id in self.rows or request_id in self.swap.requests

    def is_known(self, request_id: str) -> bool:
        """Whether it holds anything or has been added."""
        return self.holds(request_id) or request_id in self.waiting

    def rows_holding(self, ids: tuple[str, ...]) -> np.ndarray:
        """i32[n] rows of distinct requests that all hold blocks."""
        rows = self.rows.rows_of(ids)
        if (rows < 0).any():
            self.rows.row_of(ids[int(np.argmax(rows < 0))])
        return rows

    # -- reading -----------------------------------------------------------------------------------------------

    def num_free(self) -> int:
        """Blocks that an admission could take."""
        return self.ahead.num_free(self._control)

    def num_cached_free(self) -> int:
        """Those of them that have cached content, as far as the control plane has been told."""
        return self._control.num_cached_free()

    def lengths_now(self) -> np.ndarray:
        """i32[R]: tokens of every row, told or not; settles nothing."""
        return self._control.lengths() + self.ahead.used

    def columns_now(self) -> np.ndarray:
        """i32[R]: columns of every row without those in reserve; settles nothing."""
        return self._control.columns() - self.ahead.reserved(self._control)

    def blocks_of(self, request_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Blocks on the device and in host memory of one request, i32[G, columns] each; -1 where there is none."""
        none = np.zeros((len(self.config.groups), 0), np.int32)
        if (swapped := self.swap.requests.get(request_id)) is not None:
            return none, swapped.host_blocks
        return self.blocks_of_row(self.rows.row_of(request_id)), none

    def blocks_of_row(self, row: int) -> np.ndarray:
        """Blocks of a row, i32[G, columns], without those in reserve, which count as free; -1 where there is none."""
        control = self.control
        blocks = control.blocks_of(row)
        return blocks[:, : blocks.shape[1] - self.ahead.reserved(control)[row]]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of all groups that a new request of ``num_tokens`` takes."""
        return -(-num_tokens // self.config.block_size) * len(self.config.groups)

    def pressure(self, ids: tuple[str, ...], counts: np.ndarray, ok: np.ndarray) -> MemoryPressure:
        """What callbacks are told when those of ``ids`` that are not ``ok`` were refused."""
        lengths, free = self.control.lengths(), self.num_free()
        refused = {i: int(n) for i, n, served in zip(ids, counts, ok, strict=True) if not served}
        held = {i: int(lengths[self.rows.row_of(i)]) if i in self.rows else 0 for i in refused}
        needed = sum(self.blocks_for(held[i] + n) - self.blocks_for(held[i]) for i, n in refused.items())
        blocks = np.asarray(self.control.state.table.blocks)
        alone = ((blocks >= 0) & (self.control.ref_counts()[blocks] == 1)).sum(axis=1)
        alone = alone.reshape(len(self.config.groups), -1).sum(axis=0)
        alone -= self.ahead.reserved(self._control) * len(self.config.groups)  # free as it is
        frees = {i: int(alone[self.rows.row_of(i)]) for i in self.rows.ids()}
        frees = dict(sorted(frees.items(), key=lambda item: -item[1]))
        return MemoryPressure(tuple(refused), needed, free, 1.0 - free / self.config.pool_blocks, frees)

    def stats(self) -> ManagerStats:
        """See ``KVCacheManager.stats``."""
        config, table = self.config, self.control.state.table
        held = np.asarray(table.blocks).reshape(len(config.groups), -1) >= 0
        reserved = int(self.ahead.reserved(self._control).sum())  # columns; they count as free
        num_held = held.sum(axis=1) - reserved
        columns = (np.asarray(table.num_blocks)[: config.max_num_reqs].sum() - reserved) * config.block_size
        tokens = self.control.lengths().sum()
        return ManagerStats(
            num_blocks=config.pool_blocks,
            num_free_blocks=self.num_free(),
            num_cached_free_blocks=self.control.num_cached_free(),
            num_cached_blocks=len(self.prefixes),
            num_host_blocks=self.swap.num_blocks,
            num_free_host_blocks=self.swap.num_free,
            num_requests=len(self.rows),
            num_swapped_requests=len(self.swap.requests),
            num_waiting_requests=len(self.waiting),
            hit_rate=self.hit_rate.hit_rate,
            recent_hit_rate=self.hit_rate.recent_hit_rate,
            num_hits_cut_short=self.counts.hits_cut_short,
            num_hash_collisions=self.prefixes.num_collisions,
            num_evicted_blocks=self.counts.evicted_blocks,
            num_copied_blocks=self.counts.copied_blocks,
            num_swapped_out=self.counts.swapped_out,
            num_swapped_in=self.counts.swapped_in,
            num_recomputed=self.counts.recomputed,
            num_reserved_blocks=reserved * len(config.groups),
            num_prediction_hits=self.ahead.hits,
            num_prediction_misses=self.ahead.misses,
            padding_bytes=int(sum(n * config.padding_bytes(g) for g, n in enumerate(num_held))),
            empty_slot_share=float(1 - tokens / columns) if columns else 0.0,
        )

    def check_invariants(self) -> None:
        """See ``KVCacheManager.check_invariants``."""
        self.control.check_invariants()
        self.prefixes.check()

    # -- checks ------------------------------------------------------------------------------------------------

    def _check_known(self, ids: tuple[str, ...]) -> None:
        for request_id in ids:
            if not (isinstance(request_id, str) and self.is_known(request_id)):
                raise UnknownRequestError(
                    f"request {request_id!r}: unknown, want one of the {len(self.rows)} that hold blocks, or one that "
                    f"was added"
                )

    def _check_committed(self, ids: tuple[str, ...], rows: np.ndarray) -> None:
        for i in np.flatnonzero(self._drafts[rows]).tolist():
            if ids[i] in self.rows:  # else it is to have the row of one that is about to be freed
                raise InvalidArgumentError(
                    f"request {ids[i]!r}: got {self._drafts[rows[i]]} drafts not committed yet, want commit() first"
                )

    def _lengths_after(
        self, ids: tuple[str, ...], rows: np.ndarray, starts: dict[int, Start], gained: np.ndarray
    ) -> np.ndarray:
        """i64[n], tokens of each row when it has ``gained`` so many; ``RequestTooLongError`` where it can't."""
        held = self._control.lengths()[rows] + self.ahead.used[rows]
        if starts:
            held[list(starts)] = 0
        totals = held + gained
        if not len(totals) or totals.max() <= self._most_tokens:
            return totals
        worst = int(totals.argmax())
        raise RequestTooLongError(
            f"request {ids[worst]!r}: would hold {totals[worst]} tokens, want at most "
            f"{self._most_tokens} (max_model_len {self.config.max_model_len}, pool "
            f"{self.config.pool_blocks} blocks of {self.config.block_size})"
        )
