"""What ``KVCacheManager`` does, without its lock: every method is one change of all the parts together.

Arguments have been checked as far as they can be without knowing the requests. Whatever raises does so before anything
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pyagent_kv_jax.cache.kv_pages import PAGE_MOVES, KVPages, PageMove
from pyagent_kv_jax.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    OutOfBlocksError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager import defragmentation
from pyagent_kv_jax.manager.admission import Batch
from pyagent_kv_jax.manager.control_plane import NO_HITS, ControlPlane, Extended
from pyagent_kv_jax.manager.defragmentation import DefragmentationReport
from pyagent_kv_jax.manager.prefix.block_hash import BlockKeys, CacheExtras
from pyagent_kv_jax.manager.prefix.events import AllBlocksCleared, BlocksSwapped
from pyagent_kv_jax.manager.prefix.known_tokens import TokenRecord
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit
from pyagent_kv_jax.manager.request_rows import check_distinct
from pyagent_kv_jax.manager.request_start import NO_LIMIT, Start, hits_of, restored_by
from pyagent_kv_jax.manager.step_plan import AdmissionPreview, StepPlan
from pyagent_kv_jax.manager.steps_in_reserve import StepsInReserve
from pyagent_kv_jax.manager.swap_space import SwappedRequest
from pyagent_kv_jax.tables.padding import padded


class ManagerState(StepsInReserve):
    """Changes of the parts. Not thread-safe."""

    def register(self, request_id: str, tokens: np.ndarray, extras: CacheExtras, may_read: bool) -> None:
        """Remember the tokens of a request to come."""
        self.waiting[request_id] = TokenRecord.of_prompt(self.hasher, tokens, extras, may_read)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepPlan:
        """Free, admit, append, compute slots; see ``KVCacheManager.step``."""
        if batch.freed:
            check_distinct(batch.ids + batch.freed)
            self._check_known(batch.freed)
        freed_rows = [self.rows.row_of(i) for i in batch.freed if i in self.rows]
        if self.ahead.horizon and (plan := self._step_in_reserve(batch, freed_rows)) is not None:
            self._forget_freed(batch.freed)
            return plan
        rows, starts = self._rows_and_starts(batch.ids, freed_rows)
        counts = batch.counts
        cached = np.zeros(len(counts), np.int64)
        if starts:
            counts = counts.copy()
            for i, start in starts.items():
                counts[i], cached[i] = min(counts[i], start.limit), start.num_tokens
        batch.check_fit(counts)
        lengths = self._lengths_after(batch.ids, rows, starts, cached + counts)
        has_drafts = self._drafts.any()
        if has_drafts:
            self._check_committed(batch.ids, rows)
        ahead = self._reserve_ahead(batch, rows, starts, lengths) if self.ahead.horizon else None
        under_way = self._control.begin_step(
            rows,
            counts,
            [*self.ahead.freed_rows, *freed_rows],
            batch.num_rows,
            batch.num_tokens,
            hits=hits_of(starts, len(rows)),
            restored=restored_by(starts, len(rows)),
            provisional=self._drafts if has_drafts else None,
            used=self.ahead.used,
            ahead=ahead,
        )
        self.ahead.settled()
        # Another thread works on it. Meanwhile, what needs no answer, in the hope that nobody is refused.
        self._forget_freed(batch.freed)
        expects_drafts = self._expected.any()
        filling = None if expects_drafts else self._filling(rows, lengths * (counts > 0), starts)
        meta, done = under_way.result()
        ok = done.ok
        if not ok.all():
            counts, cached = np.where(ok, counts, 0), np.where(ok, cached, 0)
        self._take_in(batch.ids, rows, starts, done)
        if self.ahead.horizon:
            self.ahead.told(rows, counts * (batch.num_tokens is None), ok, reserves=ahead is not None)
            if ok.all() and counts.all():
                self.ahead.remember(rows, np.asarray(meta.block_tables))
        if expects_drafts:
            self._note_drafts(rows, counts)
            filling = self._filling(rows, (lengths - self._drafts[rows]) * (counts > 0))
        self._enter(filling, ok, np.asarray(meta.block_tables))
        return StepPlan(batch.ids, ok, counts.astype(np.int32), meta, cached.astype(np.int32))

    def _note_drafts(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Rows that have just gained ``counts`` tokens, some of them expected to be drafts."""
        rows, counts = rows[counts > 0], counts[counts > 0]
        # A request that brings fewer tokens than it reserved brings fewer drafts; the first one is none.
        self._drafts[rows] = np.clip(counts - 1, 0, self._expected[rows])
        self._expected[rows] = 0

    def warm_up(self, num_rows: int, num_tokens: int | None) -> None:
        """See ``KVCacheManager.warm_up``."""
        plane, nobody = ControlPlane(self.config, self.ahead.horizon), np.zeros(0, np.int32)
        plane.may_copy = self._control.may_copy
        caching = self.options.prefix_caching
        for freed_rows in ([], [0]):
            plane.begin_step(nobody, nobody, freed_rows, num_rows, num_tokens).result()
        plane.free([0])
        if self.ahead.horizon:
            plane.advance(self.ahead.used, self.ahead.latest)
            plane.give_back(self.ahead.reserving)
        if caching:
            plane.begin_step(nobody, nobody, [], num_rows, num_tokens, hits=NO_HITS).result()
            most_entered = (num_rows + (num_tokens or 0) // self.config.block_size) * len(self.config.groups)
            plane.warm_up_marks(most_entered)

    def admit(self, request_id: str, num_tokens: int) -> bool:
        """Admit a new request of ``num_tokens`` tokens in all, or extend one by as many; whether there was room."""
        if request_id in self.swap.requests:
            raise DuplicateRequestError(f"request {request_id!r}: is swapped out, want step() to bring it back")
        rows, starts = self._rows_and_starts((request_id,), [], at_most=num_tokens)
        cached = np.array([starts[0].num_tokens if starts else 0])
        counts = np.array([num_tokens]) - cached
        lengths = self._lengths_after((request_id,), rows, starts, cached + counts)
        self._check_committed((request_id,), rows)
        done = self.control.admit(rows, counts, hits_of(starts, 1))
        if not done.ok[0] and self._give_back_reserve():
            done = self.control.admit(rows, counts, hits_of(starts, 1))
        if not done.ok[0]:
            return False
        self._take_in((request_id,), rows, starts, done)
        self._enter(self._filling(rows, lengths), done.ok, self.control.blocks_of(int(rows[0]))[:, None])
        return True

    def _rows_and_starts(
        self, ids: tuple[str, ...], freed_rows: Sequence[int], at_most: int | None = None
    ) -> tuple[np.ndarray, dict[int, Start]]:
        """Rows i32[n], chosen but not taken for those that have none, and what the latter begin with, by index."""
        rows = self.rows.rows_of(ids)
        if not len(rows) or rows.min() >= 0:
            return rows, {}
        new = np.flatnonzero(rows < 0).tolist()
        chosen = self.rows.choose([ids[i] for i in new], freed_rows)
        rows = rows.copy()
        rows[new] = chosen
        return rows, dict(zip(new, self._starts_of([ids[i] for i in new], at_most), strict=True))

    def _starts_of(self, ids: Sequence[str], at_most: int | None = None) -> list[Start]:
        """What requests that hold no row begin with; one of known tokens must compute its last one."""
        starts: list[Start] = []
        looked_up: list[tuple[int, BlockKeys, int]] = []
        for i, request_id in enumerate(ids):
            start = self._nothing
            if (record := self.waiting.get(request_id)) is not None:
                start = Start(self._no_hit, 0, record.num_tokens, record)
                most = record.num_tokens if at_most is None else min(record.num_tokens, at_most)
                if record.may_read:
                    looked_up.append((i, record.keys, max(most - 1, 0)))
            elif (swapped := self.swap.requests.get(request_id)) is not None:
                start = Start(self._no_hit, swapped.num_tokens, NO_LIMIT, swapped.record)
                if swapped.record is not None:
                    looked_up.append((i, swapped.record.keys, swapped.num_tokens))
            starts.append(start)
        if looked_up and self.options.prefix_caching:
            hits = self.prefixes.lookup_many([(keys, most) for _, keys, most in looked_up])
            for (i, *_), hit in zip(looked_up, hits, strict=True):
                starts[i] = starts[i].with_hit(hit)
        return starts

    def hit_of(self, request_id: str) -> PrefixHit:
        """What is cached of a request that holds no row."""
        return self._starts_of([request_id])[0].hit

    def preview(self, request_id: str) -> AdmissionPreview:
        """See ``KVCacheManager.preview``."""
        record, swapped = self.waiting.get(request_id), self.swap.requests.get(request_id)
        if record is None and swapped is None:
            raise UnknownRequestError(
                f"request {request_id!r}: want one that was added or preempted, and holds no blocks on the device"
            )
        (start,) = self._starts_of([request_id])
        num_tokens = max(start.num_tokens, 0 if start.record is None else start.record.num_tokens)
        hits = start.hit.blocks[start.hit.blocks >= 0]
        control = self.control if self.ahead.freed_rows else self._control
        revived = int((control.ref_counts()[hits] == 0).sum())
        return AdmissionPreview(
            start.num_tokens, self.blocks_for(num_tokens) - self.blocks_for(start.hit.num_tokens) + revived
        )

    def _take_in(self, ids: tuple[str, ...], rows: np.ndarray, starts: dict[int, Start], done: Extended) -> None:
        """After an admission: rows are taken, evicted keys forgotten, pages moved."""
        self._forget_evicted(done.evicted_ids)
        served = {i: start for i, start in starts.items() if done.ok[i]}
        self.rows.take({ids[i]: int(rows[i]) for i in served})
        swap_ins: list[tuple[np.ndarray, np.ndarray]] = []
        for i, start in served.items():
            row, request_id = int(rows[i]), ids[i]
            self._expected[row] = self._drafts[row] = self._hollow[:, row] = 0
            self.ahead.start(row)
            record = self.waiting.pop(request_id, None)
            if request_id in self.swap.requests:
                record = self.swap.requests[request_id].record
                self._hollow[:, row] = self.swap.requests[request_id].hollow
                swap_ins.append(self._swap_in(request_id, row, start))
            if record is not None:
                self._count_hit(record, start.hit)
                self.tokens.place(row, record, start.hit.num_tokens // self.config.block_size)
        self._move_pages(done, swap_ins)
        for i in served:
            if ids[i] in self.swap.requests:
                self.swap.drop(ids[i])  # its copy in is under way; later copies out wait for it

    def _count_hit(self, record: TokenRecord, hit: PrefixHit) -> None:
        if not record.is_counted and record.may_read and self.options.prefix_caching:
            self.hit_rate.record(record.num_tokens, hit.num_tokens)
            self.counts.hits_cut_short += hit.limited_by is not None
            self.prefixes.count_hits(hit.blocks)
        record.is_counted = True

    def _swap_in(self, request_id: str, row: int, start: Start) -> tuple[np.ndarray, np.ndarray]:
        """(host blocks, blocks) to be copied."""
        host_blocks, first = self.swap.requests[request_id].host_blocks, start.hit.blocks.shape[1]
        blocks = self.control.blocks_of(row)[:, first : host_blocks.shape[1]]
        host_blocks = host_blocks[:, first:]
        self.counts.swapped_in += 1
        self.events.append(BlocksSwapped(request_id, "in", int((host_blocks >= 0).sum())))
        return host_blocks[host_blocks >= 0], blocks[host_blocks >= 0]

    def _move_pages(self, done: Extended, swap_ins: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Zero, copy and bring back blocks before the step that was planned writes to them."""
        src, dst = done.copies
        self.counts.copied_blocks += len(src)
        if self.pages is None:  # nothing was ever written
            return
        if self.options.zero_on_free and len(done.new_ids):
            self._in_place("clear", done.new_ids)
        if swap_ins:
            host, blocks = (np.concatenate(each) for each in zip(*swap_ins, strict=True))
            if len(host):
                assert isinstance(self.pages, KVPages)  # on a mesh there are no host blocks
                self.pages = self.swap.copy_in(self.pages, host, blocks)
        if len(src):
            self._in_place("copy", src, dst)

    def _in_place(self, move: PageMove, *ids: np.ndarray) -> None:
        """Clear or copy blocks in the pages."""
        words = [padded(each) for each in ids]
        if self.before_page_move is not None:
            self.before_page_move(move, words)
        self.pages = PAGE_MOVES[move](self.pages, *words)

    # -- giving back -------------------------------------------------------------------------------------------

    def free(self, ids: tuple[str, ...]) -> None:
        """Let requests go, wherever they are."""
        self._check_known(ids)
        self.control.free([self.rows.row_of(i) for i in ids if i in self.rows])
        self._forget_freed(ids)

    def _forget_freed(self, ids: tuple[str, ...]) -> None:
        for request_id in ids:
            if request_id in self.rows:
                row = self.rows.row_of(request_id)
                self.tokens.take(row)
                self._expected[row] = self._drafts[row] = 0
                self.ahead.end(row)
            elif request_id in self.swap.requests:
                self.swap.drop(request_id)
            self.waiting.pop(request_id, None)
        self.rows.give_up(i for i in ids if i in self.rows)

    def _forget_evicted(self, ids: np.ndarray) -> None:
        if len(ids):
            self.counts.evicted_blocks += len(ids)
            for event in self.prefixes.evict(ids, tell=self.events.enabled):
                self.events.append(event)

    # -- forks and drafts --------------------------------------------------------------------------------------

    def fork(self, parent: str, child: str) -> None:
        """See ``KVCacheManager.fork``."""
        row = self.rows.row_of(parent)
        if self.is_known(child):
            raise DuplicateRequestError(f"request {child!r}: is already here, want a new id for the fork")
        self._check_committed((parent,), np.array([row]))
        (child_row,) = self.rows.choose([child], [])
        self._give_back_reservation(row)
        self.control.fork(row, child_row)
        self.rows.take({child: child_row})
        self._expected[child_row] = self._drafts[child_row] = 0
        self.ahead.start(child_row)
        self._hollow[:, child_row] = self._hollow[:, row]
        record = self.tokens.record_of(row)
        if record is not None:
            self.tokens.place(child_row, record.copy(), self.tokens.columns_entered(row))

    def _give_back_reservation(self, row: int) -> None:
        """Blocks set aside past the tokens: two requests must not write into the same ones."""
        length = self.control.lengths()[row].copy()
        if self.control.blocks_of(row).shape[1] > -(-length // self.config.block_size):
            self.control.truncate(np.array([row]), np.array([length]))
        self._expected[row] = 0

    def reserve(self, request_id: str, drafts: int) -> bool:
        """Set blocks aside for one token and ``drafts`` more; whether there was room."""
        rows = np.array([self.rows.row_of(request_id)], np.int32)
        self._check_committed((request_id,), rows)
        counts = np.array([drafts + 1])
        self._lengths_after((request_id,), rows, {}, counts)
        done = self.control.admit(rows, counts, only_blocks=True)
        if not done.ok[0] and self._give_back_reserve():
            done = self.control.admit(rows, counts, only_blocks=True)
        if not done.ok[0]:
            return False
        self.ahead.hand_over(int(rows[0]))
        self._forget_evicted(done.evicted_ids)
        self._move_pages(done, [])
        self._expected[rows] = drafts
        return True

    def commit(self, ids: tuple[str, ...], accepted: np.ndarray) -> None:
        """See ``KVCacheManager.commit``."""
        rows = self.rows_holding(ids)
        drafts = self._drafts[rows]
        if (accepted > drafts).any():
            wrong = int(np.argmax(accepted > drafts))
            raise InvalidArgumentError(
                f"request {ids[wrong]!r}: got {accepted[wrong]} accepted drafts, want at most {drafts[wrong]}, "
                f"those computed and not yet committed"
            )
        self.control.truncate(rows, self.control.lengths()[rows] - drafts + accepted.astype(np.int32))
        self._drafts[rows] = self._expected[rows] = 0

    # -- preemption --------------------------------------------------------------------------------------------

    def preempt(self, ids: tuple[str, ...], mode: Literal["auto", "swap", "recompute"]) -> dict[str, str]:
        """See ``KVCacheManager.preempt``."""
        rows = self.rows_holding(ids)
        self._check_committed(ids, rows)
        lengths = self.control.lengths()[rows].copy()
        columns = -(-lengths // self.config.block_size)  # those set aside for drafts hold nothing
        blocks = [self.control.blocks_of(row)[:, :n] for row, n in zip(rows.tolist(), columns.tolist(), strict=True)]
        for row, held in zip(rows.tolist(), blocks, strict=True):
            held[np.arange(held.shape[1]) < self._hollow[:, row, None] // self.config.block_size] = -1
        wanted = [int((held >= 0).sum()) for held in blocks]
        if mode == "swap" and sum(wanted) > self.swap.num_free:
            raise OutOfBlocksError(
                f"requests {list(ids)}: {sum(wanted)} blocks do not fit into {self.swap.num_free} free host blocks of "
                f"{self.swap.num_blocks}"
            )
        cost, block_bytes, room = self.options.preemption_cost, self.config.block_size_bytes(), self.swap.num_free
        done, swapped = {}, []
        for i, request_id in enumerate(ids):
            cheaper = cost.prefers_swap(wanted[i] * block_bytes, int(lengths[i]))
            swaps = mode == "swap" or (
                mode == "auto" and cheaper and wanted[i] <= room and self._could_come_back(int(rows[i]))
            )
            done[request_id] = "swap" if swaps else "recompute"
            if swaps:
                room -= wanted[i]
                swapped.append(i)
        self._swap_out([(ids[i], int(rows[i]), int(lengths[i]), blocks[i]) for i in swapped])
        for i, request_id in enumerate(ids):
            record = self.tokens.take(int(rows[i]))
            if i not in swapped:
                self.counts.recomputed += 1
                if record is not None:
                    self.waiting[request_id] = record
        self.control.free(rows.tolist())
        self._expected[rows] = 0
        self.rows.give_up(ids)
        return done

    def _could_come_back(self, row: int) -> bool:
        """Whether the pool has blocks enough for a row that is swapped in: all its columns, in every group."""
        record = self.tokens.record_of(row)
        num_tokens = max(int(self.control.lengths()[row]) + 1, 0 if record is None else record.num_tokens)
        return self.blocks_for(num_tokens) <= self.config.pool_blocks

    def _swap_out(self, requests: list[tuple[str, int, int, np.ndarray]]) -> None:
        pairs = []
        for request_id, row, length, blocks in requests:
            host_blocks = self.swap.allocate(blocks)
            assert host_blocks is not None
            gone = (blocks < 0).sum(axis=1) * self.config.block_size
            hollow = np.maximum(gone, self._hollow[:, row])
            self.swap.put(request_id, SwappedRequest(length, host_blocks, self.tokens.record_of(row), hollow))
            pairs.append((blocks[blocks >= 0], host_blocks[blocks >= 0]))
            self.counts.swapped_out += 1
            self.events.append(BlocksSwapped(request_id, "out", len(pairs[-1][0])))
        if pairs and self.pages is not None:
            blocks, host_blocks = (np.concatenate(each) for each in zip(*pairs, strict=True))
            if len(blocks):
                assert isinstance(self.pages, KVPages)
                self.swap.copy_out(self.pages, blocks, host_blocks)

    # -- the prefix cache --------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """See ``KVCacheManager.reset_prefix_cache``."""
        self.control.uncache(self.prefixes.cached_ids())
        self.prefixes.reset()
        self.hit_rate.reset()
        self.events.append(AllBlocksCleared())

    def evict_prefix(self, tokens: np.ndarray, extras: CacheExtras) -> int:
        """See ``KVCacheManager.evict_prefix``."""
        keys = self.hasher.start(extras)
        keys.extend(tokens[: len(tokens) // self.config.block_size * self.config.block_size])
        ids = self.prefixes.cached_ids(keys)
        self.control.uncache(ids)
        for event in self.prefixes.forget(ids):
            self.events.append(event)
        return len(ids)

    # -- order -------------------------------------------------------------------------------------------------

    def defragment(self, runs: bool, below: float) -> DefragmentationReport:
        """See ``KVCacheManager.defragment``."""
        state = self.control.state
        in_use, cached = self.control.ref_counts() > 0, np.asarray(state.pool.cached)
        blocks = np.asarray(state.table.blocks)
        run_share = defragmentation.run_share(blocks)
        if run_share >= below:
            return DefragmentationReport(0, int(in_use.sum()), int((cached & ~in_use).sum()), run_share)
        new_ids = defragmentation.in_runs(blocks, in_use) if runs else defragmentation.compacting(in_use)
        moved = np.flatnonzero((in_use | cached) & (new_ids != np.arange(len(new_ids)))).astype(np.int32)
        if len(moved):
            self.control.rearrange(defragmentation.renamed(state, new_ids))
            named = moved[cached[moved]]
            self.prefixes.remap(named, new_ids[named])
            if self.pages is not None:
                self._in_place("copy", moved, new_ids[moved])
        return DefragmentationReport(len(moved), int(in_use.sum()), int((cached & ~in_use).sum()), run_share)
