"""A manager's decode steps from reserved blocks, and when it reserves and gives back; see ``decode_ahead.py``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pyagent_kv_jax.manager.admission import Batch
from pyagent_kv_jax.manager.block_size_switch import ChangesBlockSize
from pyagent_kv_jax.manager.prefix_filling import Filling
from pyagent_kv_jax.manager.request_start import Start
from pyagent_kv_jax.manager.step_plan import StepPlan

_SHARE_OF_CACHED = 8  # of the free blocks with cached content, one in so many may be reserved at a time


class StepsInReserve(ChangesBlockSize):
    """``ManagerState``'s steps that take no call of the control plane."""

    def _step_in_reserve(self, batch: Batch, freed_rows: list[int]) -> StepPlan | None:
        """A decode step of requests that all have blocks in reserve for it; None: it takes the control plane."""
        rows = self.rows.rows_of(batch.ids)
        if batch.num_tokens is not None or rows.min(initial=0) < 0 or not batch.counts.any():
            return None  # a step without tokens lets go of what no window sees
        if self._drafts.any() or self._expected.any():
            return None
        batch.check_fit(batch.counts)
        lengths = self._lengths_after(batch.ids, rows, {}, batch.counts)
        held = lengths - batch.counts
        meta = self.ahead.serve(self._control, rows, batch.counts, held, batch.num_rows)
        if meta is None:
            return None
        filling, ok = self._filling(rows, lengths * (batch.counts > 0)), np.ones(len(rows), bool)
        self._enter(filling, ok, np.asarray(meta.block_tables))
        self.ahead.take(rows, batch.counts, held, freed_rows)
        return StepPlan(batch.ids, ok, batch.counts.astype(np.int32), meta, np.zeros(len(rows), np.int32))

    def _reserve_ahead(
        self, batch: Batch, rows: np.ndarray, starts: Mapping[int, Start], lengths: np.ndarray
    ) -> np.ndarray | None:
        """Tokens i64[n] that the rows of a decode step get blocks for ahead; None: none, for others may want them.

        Hardly at the cost of cached content: who comes back for it saves more than a call of the control plane. Where
        even without a reserve the blocks might not suffice, what is in reserve is given back first.
        """
        held = self._control.columns()[rows]
        held[list(starts)] = 0
        copies = len(rows) if self._control.may_copy else 0

        def blocks_for(tokens: np.ndarray) -> int:
            columns = np.maximum(-(-tokens // self.config.block_size) - held, 0)
            return (int(columns.sum()) + copies) * len(self.config.groups)

        free = self._control.num_free()
        if batch.num_tokens is None:
            self.ahead.missed(self._control, rows, lengths)
            wanted = self.ahead.wanted(rows, batch.counts, lengths)
            cached = self._control.num_cached_free()
            if blocks_for(lengths + wanted) <= free - cached + cached // _SHARE_OF_CACHED:
                return wanted
        if blocks_for(lengths) > free:
            self._give_back_reserve()
        return None

    def _give_back_reserve(self) -> bool:
        """Free what decode steps have in reserve; whether there was any."""
        control = self.control
        if not self.ahead.reserved(control).any():
            return False
        control.give_back(self.ahead.reserving)
        self.ahead.given_back()
        return True

    def _filling(self, rows: np.ndarray, lengths: np.ndarray, starts: Mapping[int, Start] = {}) -> Filling | None:
        return self.filler.plan(rows, lengths, starts) if self.options.prefix_caching else None

    def _enter(self, filling: Filling | None, ok: np.ndarray, tables: np.ndarray) -> None:
        if filling is not None:
            for entered in self.filler.enter(filling, ok, tables, self._hollow):
                self._control.mark_cached(entered)
