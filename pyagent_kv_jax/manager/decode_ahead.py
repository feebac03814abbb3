"""Decode steps answered from blocks that were reserved ahead, without asking the control plane.

Every so many decode steps the control plane gives each request blocks for the steps to come. Until they are used up, a
step is a few numpy operations on the host: the next slot of each row. What the control plane then does not know yet
(tokens used, requests that ended) is told with its next call. Reserved blocks count as free: they are given back before
anybody is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.manager.control_plane import ControlPlane
from pyagent_kv_jax.manager.growth_predictor import GrowthPredictor


class DecodeAhead:
    """What rows hold in reserve, and what was done since the control plane was last called. Not thread-safe.

    Attributes:
        horizon: decode steps that blocks are reserved for at most; 0: none, and nothing is ever put off.
        used: i32[R], tokens of each row that the control plane has not been told of.
        latest: i32[R], those of them that the last step brought: what it sees is not let go of before the next one.
        reserving: bool[R], rows whose columns past their tokens are in reserve.
        freed_rows: rows whose requests are gone, their references not yet dropped.
        hits: blocks that were needed, and had been reserved.
        misses: blocks that decode steps needed and that had not been reserved.
    """

    def __init__(self, config: KVCacheConfig, horizon: int) -> None:
        self.horizon = horizon
        self.used = np.zeros(config.max_num_reqs, np.int32)
        self.latest = np.zeros_like(self.used)
        self.freed_rows: list[int] = []
        self.hits = self.misses = 0
        self._config = config
        self._num_groups = len(config.groups)
        self._predictor = GrowthPredictor()
        self.reserving = np.zeros(config.max_num_reqs, bool)
        self._gained = np.zeros(config.max_num_reqs, np.int64)  # tokens by decode steps
        self._tables: tuple[np.ndarray, np.ndarray] | None = None  # rows of the last step, and their blocks

    # -- a decode step -----------------------------------------------------------------------------------------

    def serve(
        self, control: ControlPlane, rows: np.ndarray, counts: np.ndarray, lengths: np.ndarray, num_rows: int
    ) -> AttentionMetadata | None:
        """A decode step of ``rows`` i32[n] that hold ``lengths`` i64[n] and gain ``counts``, 0 or 1; padded.

        None: that takes the control plane.

        Changes nothing until ``take``.
        """
        size, n = self._config.block_size, len(rows)
        gains = counts > 0
        columns = np.where(gains, lengths // size, 0)
        if (gains & (columns >= control.columns()[rows])).any():
            return None
        tables = self._tables_of(control, rows, num_rows)
        blocks = tables[..., np.arange(n), columns]  # [n], or [G, n]
        if control.may_copy and (gains & (lengths % size > 0) & (control.ref_counts()[blocks] > 1)).any():
            return None  # shared, and to be written
        slots = np.full((*tables.shape[:-2], num_rows), -1, np.int32)
        slots[..., :n] = np.where(gains, blocks * size + lengths % size, -1)
        arrays: dict[str, Any] = {name: np.zeros(num_rows, np.int32) for name in ("kv_lens", "positions")}
        arrays["kv_lens"][:n] = np.where(gains, lengths + 1, 0)
        arrays["positions"][:n] = np.where(gains, lengths, 0)
        arrays |= {"block_tables": tables, "slot_mapping": slots, "ok": np.arange(num_rows) < n}
        return AttentionMetadata(**arrays, query_start_loc=None, max_query_len=1, max_kv_len=control.max_tokens_per_req)

    def take(self, rows: np.ndarray, counts: np.ndarray, lengths: np.ndarray, freed_rows: list[int]) -> None:
        """What ``serve`` answered has been done; requests in ``freed_rows`` are gone."""
        begun = (counts > 0) & (lengths % self._config.block_size == 0)
        self.hits += int(begun.sum()) * self._num_groups
        self.latest = np.zeros_like(self.used)
        self.latest[rows] = counts
        self.used += self.latest
        self._gained[rows] += counts
        self.freed_rows += freed_rows

    def _tables_of(self, control: ControlPlane, rows: np.ndarray, num_rows: int) -> np.ndarray:
        """i32[num_rows, W], or i32[G, num_rows, W] of several groups; the same array as long as nothing changes."""
        if self._tables is None or self._tables[1].shape[-2] != num_rows or not np.array_equal(self._tables[0], rows):
            held = control.tables()[:, rows]
            tables = np.full((len(held), num_rows, held.shape[-1]), -1, np.int32)
            tables[:, : len(rows)] = held
            tables.flags.writeable = False  # several steps show it
            self._tables = rows, tables if self._num_groups > 1 else tables[0]
        return self._tables[1]

    # -- what the control plane is asked for -------------------------------------------------------------------

    def wanted(self, rows: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """i64[n]: tokens past ``lengths`` i64[n] that blocks should be reserved for, for rows that gain ``counts``."""
        remaining = np.minimum(self._predictor.remaining(self._gained[rows] + counts), self.horizon)
        room = self._config.max_request_tokens - lengths
        return np.where(counts > 0, np.clip(remaining, 0, np.maximum(room, 0)), 0).astype(np.int64)

    def told(self, rows: np.ndarray, counts: np.ndarray, ok: np.ndarray, reserves: bool) -> None:
        """The control plane was asked.

        Args:
            rows: i32[n], of its step.
            counts: i64[n], decode tokens they gained.
            ok: bool[n].
            reserves: whether it was asked to reserve blocks.
        """
        self._gained[rows] += np.where(ok, counts, 0)
        if reserves:
            self.reserving[rows[ok & (counts > 0)]] = True  # the others may hold blocks set aside for drafts

    def settled(self) -> None:
        """The control plane was told of all that had been put off."""
        self.used = np.zeros_like(self.used)  # a new one: the call may still be reading the old
        self.freed_rows = []
        self._tables = None

    def start(self, row: int) -> None:
        """``row`` is a new request's, or the columns it has past its tokens are no reserve of this."""
        self.reserving[row] = False
        self._gained[row] = 0

    def end(self, row: int) -> None:
        """The request of ``row`` has ended."""
        if self._gained[row]:
            self._predictor.learn(int(self._gained[row]))
        self.start(row)

    def hand_over(self, row: int) -> None:
        """What ``row`` has in reserve belongs to somebody else now."""
        self.reserving[row] = False

    def given_back(self) -> None:
        """Nothing is in reserve any more."""
        self.reserving = np.zeros_like(self.reserving)  # a new one, as above
        self._tables = None

    def resize(self, config: KVCacheConfig) -> None:
        """Blocks have another size, and nothing is in reserve any more."""
        self._config = config
        self.given_back()

    def remember(self, rows: np.ndarray, tables: np.ndarray) -> None:
        """The blocks of ``rows``, all of which were served, as the control plane has just told them."""
        self._tables = rows, tables

    def missed(self, control: ControlPlane, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Count the blocks that decode ``rows`` lack to hold ``lengths`` i64[n]."""
        lacking = -(-lengths // self._config.block_size) - control.columns()[rows]
        self.misses += int(np.maximum(lacking, 0).sum()) * self._num_groups

    # -- what could be given back ------------------------------------------------------------------------------

    def reserved(self, control: ControlPlane) -> np.ndarray:
        """i32[R]: columns of each row that are in reserve."""
        if not self.reserving.any():
            return np.zeros(len(self.used), np.int32)
        needed = -(-(control.lengths() + self.used) // self._config.block_size)
        return np.where(self.reserving, control.columns() - needed, 0)

    def num_free(self, control: ControlPlane) -> int:
        """Blocks that are free, or will be once all that was put off is done and the reserve given back."""
        free = control.num_free() + int(self.reserved(control).sum()) * self._num_groups
        dropped = control.out_of_sight(self.used, self.latest, self.freed_rows) if self.used.any() else []
        if self.freed_rows:
            dropped.append(control.tables()[:, self.freed_rows].ravel())
        if dropped:
            named, times = np.unique(np.concatenate(dropped), return_counts=True)
            times, named = times[named >= 0], named[named >= 0]
            free += int((control.ref_counts()[named] == times).sum())
        return free
