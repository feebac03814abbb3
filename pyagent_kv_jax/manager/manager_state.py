"""What ``KVCacheManager`` does, without its lock: every method is one change of all the parts together.

Arguments have been checked as far as they can be without knowing the requests. Whatever raises does so before anything
changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from pyagent_kv_jax.cache.grouped_rows import Hits
from pyagent_kv_jax.cache.kv_pages import KVPages, clear_blocks_in_place, copy_blocks_in_place
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    OutOfBlocksError,
    RequestTooLongError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager import defragmentation
from pyagent_kv_jax.manager.admission import Batch
from pyagent_kv_jax.manager.block_hash import BlockHasher, BlockKeys, CacheExtras
from pyagent_kv_jax.manager.control_plane import ControlPlane, Extended
from pyagent_kv_jax.manager.defragmentation import DefragmentationReport
from pyagent_kv_jax.manager.events import AllBlocksCleared, BlocksSwapped, BlockStored, EventLog
from pyagent_kv_jax.manager.known_tokens import FullBlocks, KnownTokens, TokenRecord
from pyagent_kv_jax.manager.manager_stats import Counts, ManagerStats
from pyagent_kv_jax.manager.memory_pressure import MemoryPressure
from pyagent_kv_jax.manager.options import ManagerOptions
from pyagent_kv_jax.manager.prefix_cache import Claim, PrefixCache, PrefixHit
from pyagent_kv_jax.manager.prefix_statistics import PrefixStatistics
from pyagent_kv_jax.manager.request_rows import RequestRows, check_distinct
from pyagent_kv_jax.manager.step_plan import AdmissionPreview, StepPlan
from pyagent_kv_jax.manager.swap_space import SwappedRequest, SwapSpace
from pyagent_kv_jax.tables.padding import padded

_NO_LIMIT = 2**31 - 1


class Start(NamedTuple):
    """What a request that holds no row begins with.

    Attributes:
        hit: cached blocks.
        num_tokens: tokens not to be computed: the hit's, or all that were swapped out.
        limit: most tokens to be computed now.
        record: its tokens, as far as they are known.
    """

    hit: PrefixHit
    num_tokens: int
    limit: int
    record: TokenRecord | None = None

    @property
    def restored(self) -> int:
        """Tokens brought back from host memory."""
        return self.num_tokens - self.hit.num_tokens

    def with_hit(self, hit: PrefixHit) -> Start:
        """The same, beginning with cached blocks."""
        if self.num_tokens:  # all of these were swapped out, the cached ones among them
            return Start(hit, self.num_tokens, self.limit, self.record)
        return Start(hit, hit.num_tokens, self.limit - hit.num_tokens, self.record)


class Filling(NamedTuple):
    """Blocks that a step fills, before it is known which they are."""

    full: FullBlocks
    claim: Claim | None


class ManagerState:
    """Rows, tables, pool, pages, prefix cache and swap space. Not thread-safe."""

    def __init__(self, config: KVCacheConfig, options: ManagerOptions) -> None:
        self.config = config
        self.options = options
        self.pages: KVPages | None = None
        self.control = ControlPlane(config)
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
        self.hit_rate = PrefixStatistics(options.hit_rate_window)
        self.counts = Counts()
        self._no_hit = PrefixHit(0, np.zeros((len(config.groups), 0), np.int32), None)
        self._nothing = Start(self._no_hit, 0, _NO_LIMIT)
        self._expected = np.zeros(config.max_num_reqs, np.int32)  # drafts of the next step
        self._drafts = np.zeros(config.max_num_reqs, np.int32)  # computed, and not yet committed
        # Leading columns whose blocks hold nothing: they were out of sight when the request was swapped out.
        self._hollow = np.zeros((len(config.groups), config.max_num_reqs), np.int32)

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
        check_distinct(ids)
        return rows

    def register(self, request_id: str, tokens: np.ndarray, extras: CacheExtras, may_read: bool) -> None:
        """Remember the tokens of a request to come."""
        self.waiting[request_id] = TokenRecord.of_prompt(self.hasher, tokens, extras, may_read)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepPlan:
        """Free, admit, append, compute slots; see ``KVCacheManager.step``."""
        self._check_known(batch.freed)
        freed_rows = [self.rows.row_of(i) for i in batch.freed if i in self.rows]
        rows, starts = self._rows_and_starts(batch.ids, freed_rows)
        counts = batch.counts
        cached = np.zeros(len(counts), np.int64)
        if starts:
            counts = counts.copy()
            for i, start in starts.items():
                counts[i], cached[i] = min(counts[i], start.limit), start.num_tokens
        batch.check_fit(counts)
        lengths = self._lengths_after(batch.ids, rows, starts, cached + counts)
        self._check_committed(batch.ids, rows)
        under_way = self.control.begin_step(
            rows,
            counts,
            freed_rows,
            batch.num_rows,
            batch.num_tokens,
            hits=_hits(starts, len(rows)),
            restored=_restored(starts, len(rows)),
            provisional=self._drafts if self._drafts.any() else None,
        )
        # Another thread works on it. Meanwhile, what needs no answer, in the hope that nobody is refused.
        self._forget_freed(batch.freed)
        has_drafts = self._expected.any()
        filling = None if has_drafts else self._filling(rows, lengths * (counts > 0), starts)
        meta, done = under_way.result()
        ok = done.ok
        if not ok.all():
            counts, cached = np.where(ok, counts, 0), np.where(ok, cached, 0)
        self._take_in(batch.ids, rows, starts, done)
        if has_drafts:
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
        plane, nobody = ControlPlane(self.config), np.zeros(0, np.int32)
        plane.may_copy = self.control.may_copy
        caching = self.options.prefix_caching
        for freed_rows in ([], [0]):
            plane.begin_step(nobody, nobody, freed_rows, num_rows, num_tokens).result()
        plane.free([0])
        if caching:
            plane.begin_step(nobody, nobody, [], num_rows, num_tokens, hits=Hits(nobody, nobody)).result()
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
        done = self.control.admit(rows, counts, _hits(starts, 1))
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
        new = np.flatnonzero(rows < 0).tolist()
        if not new:
            return rows, {}
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
                start = Start(self._no_hit, swapped.num_tokens, _NO_LIMIT, swapped.record)
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
        revived = int((self.control.ref_counts()[hits] == 0).sum())
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
            record = self.waiting.pop(request_id, None)
            if request_id in self.swap.requests:
                record = self.swap.requests[request_id].record
                self._hollow[:, row] = (self.swap.requests[request_id].host_blocks < 0).sum(axis=1)
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
            self.pages = clear_blocks_in_place(self.pages, padded(done.new_ids))
        if swap_ins:
            host, blocks = (np.concatenate(each) for each in zip(*swap_ins, strict=True))
            if len(host):
                self.pages = self.swap.copy_in(self.pages, host, blocks)
        if len(src):
            self.pages = copy_blocks_in_place(self.pages, padded(src), padded(dst))

    def _filling(self, rows: np.ndarray, lengths: np.ndarray, starts: Mapping[int, Start] = {}) -> Filling | None:
        """What is to be entered once ``rows`` i32[n] hold ``lengths`` i64[n] tokens that are no drafts.

        ``starts``, by index, of those that have not taken their rows yet. To be given to ``_enter``, nothing looked up
        before.
        """
        if not self.options.prefix_caching:
            return None
        full, block_size = self.tokens.newly_full(rows, lengths), self.config.block_size
        if starts:
            full = full.and_those_of(
                [
                    (i, int(rows[i]), start.record.keys, start.hit.blocks.shape[1], int(lengths[i]) // block_size)
                    for i, start in starts.items()
                    if start.record is not None
                ]
            )
        return Filling(full, self.prefixes.claim(full.runs())) if full.keys else None

    def _enter(self, filling: Filling | None, ok: np.ndarray, tables: np.ndarray) -> None:
        """What the ``ok`` bool[n] have filled can be hit from now on.

        ``tables`` i32[n, columns], or i32[G, n, columns] of several groups; -1 for those that are not ok.
        """
        if filling is None:
            return
        full, claim = filling
        self.tokens.enter(full if ok.all() else full.of(ok))
        at, columns = full.entries()
        for group, table in enumerate(tables if tables.ndim == 3 else tables[None]):
            ids = table[at, columns]
            if self._hollow.any():
                ids = np.where(columns < self._hollow[group, full.rows_of_entries()], -1, ids)
            if claim is not None:
                entered = self.prefixes.enter(group, claim, ids)
            else:
                ends = np.cumsum(full.last - full.first)
                runs = zip(full.runs(), np.split(ids, ends[:-1]), strict=True)
                entered = np.concatenate([self.prefixes.insert(group, k, first, run) for (k, first, _), run in runs])
            self.control.mark_cached(entered)
            if self.events.enabled:
                self._tell_stored(group, full, ids, entered)

    def _tell_stored(self, group: int, full: FullBlocks, ids: np.ndarray, entered: np.ndarray) -> None:
        stored, start = np.isin(ids, entered), 0
        for keys, column, last in full.runs():
            for first, end in _runs(stored[start : start + last - column]):
                blocks = ids[start + first : start + end].tolist()
                digests = keys.digests[column + first : column + end]
                self.events.append(
                    BlockStored(
                        group, tuple(blocks), tuple(digests), keys.parent_of(column + first), keys.extras.adapter
                    )
                )
            start += last - column

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
            elif request_id in self.swap.requests:
                self.swap.drop(request_id)
            self.waiting.pop(request_id, None)
        self.rows.give_up(i for i in ids if i in self.rows)

    def _forget_evicted(self, ids: np.ndarray) -> None:
        if len(ids):
            self.counts.evicted_blocks += len(ids)
            for event in self.prefixes.forget(ids, tell=self.events.enabled):
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
        if not done.ok[0]:
            return False
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
            held[np.arange(held.shape[1]) < self._hollow[:, row, None]] = -1
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
            self.swap.put(request_id, SwappedRequest(length, host_blocks, self.tokens.record_of(row)))
            pairs.append((blocks[blocks >= 0], host_blocks[blocks >= 0]))
            self.counts.swapped_out += 1
            self.events.append(BlocksSwapped(request_id, "out", len(pairs[-1][0])))
        if pairs and self.pages is not None:
            blocks, host_blocks = (np.concatenate(each) for each in zip(*pairs, strict=True))
            if len(blocks):
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

    def defragment(self, runs: bool) -> DefragmentationReport:
        """See ``KVCacheManager.defragment``."""
        state = self.control.state
        in_use, cached = self.control.ref_counts() > 0, np.asarray(state.pool.cached)
        if runs:
            new_ids = defragmentation.in_runs(np.asarray(state.table.blocks), in_use)
        else:
            new_ids = defragmentation.compacting(in_use)
        moved = np.flatnonzero((in_use | cached) & (new_ids != np.arange(len(new_ids)))).astype(np.int32)
        if len(moved):
            self.control.rearrange(defragmentation.renamed(state, new_ids))
            named = moved[cached[moved]]
            self.prefixes.remap(named, new_ids[named])
            if self.pages is not None:
                self.pages = copy_blocks_in_place(self.pages, padded(moved), padded(new_ids[moved]))
        return DefragmentationReport(len(moved), int(in_use.sum()), int((cached & ~in_use).sum()))

    # -- reading -----------------------------------------------------------------------------------------------

    def num_free(self) -> int:
        """Blocks that an admission could take."""
        return self.control.num_free()

    def blocks_of(self, request_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Blocks on the device and in host memory of one request, i32[G, columns] each; -1 where there is none."""
        none = np.zeros((len(self.config.groups), 0), np.int32)
        if (swapped := self.swap.requests.get(request_id)) is not None:
            return none, swapped.host_blocks
        return self.control.blocks_of(self.rows.row_of(request_id)), none

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
        frees = {i: int(alone[self.rows.row_of(i)]) for i in self.rows.ids()}
        frees = dict(sorted(frees.items(), key=lambda item: -item[1]))
        return MemoryPressure(tuple(refused), needed, free, 1.0 - free / self.config.pool_blocks, frees)

    def stats(self) -> ManagerStats:
        """See ``KVCacheManager.stats``."""
        config, table = self.config, self.control.state.table
        held = np.asarray(table.blocks).reshape(len(config.groups), -1) >= 0
        num_held = held.sum(axis=1)
        columns = np.asarray(table.num_blocks)[: config.max_num_reqs].sum() * config.block_size
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
        held = self.control.lengths()[rows]
        if starts:
            held[list(starts)] = 0
        totals = held + gained
        if not len(totals) or totals.max() <= self.config.max_request_tokens:
            return totals
        worst = int(totals.argmax())
        raise RequestTooLongError(
            f"request {ids[worst]!r}: would hold {totals[worst]} tokens, want at most "
            f"{self.config.max_request_tokens} (max_model_len {self.config.max_model_len}, pool "
            f"{self.config.pool_blocks} blocks of {self.config.block_size})"
        )


def _hits(starts: dict[int, Start], num_rows: int) -> Hits | None:
    hit = {i: start.hit.blocks for i, start in starts.items() if start.hit.num_tokens}
    if not hit:
        return None
    columns = np.zeros(num_rows, np.int32)
    for i, blocks in hit.items():
        columns[i] = blocks.shape[1]
    return Hits(np.concatenate([blocks.ravel() for blocks in hit.values()]), columns)


def _restored(starts: dict[int, Start], num_rows: int) -> np.ndarray | None:
    back = {i: start.restored for i, start in starts.items() if start.restored}
    if not back:
        return None
    restored = np.zeros(num_rows, np.int64)
    restored[list(back)] = list(back.values())
    return restored


def _runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of each run of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
