"""The manager's pool and tables on the host's XLA CPU device, and the jitted calls over them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np

from pyagent_kv_jax.cache import grouped_rows
from pyagent_kv_jax.cache.grouped_rows import Extension, GroupedRows, Hits
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import InvalidBlockError
from pyagent_kv_jax.manager.packed_step import Extended, StepShape, StepUnderWay, pack, packed_step
from pyagent_kv_jax.pool import check_invariants
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU, made_on_host
from pyagent_kv_jax.tables.padding import padded, power_of_two

_FREED_IN_A_STEP = 1024  # blocks; longer rows are freed by a call of their own
_FEWEST_MARKS = 64  # fewer are padded to as many
NO_HITS = Hits(np.zeros(0, np.int32), np.zeros(0, np.int32))


class ControlPlane:
    """Owns the control pytrees and donates them to each call. Not thread-safe: the manager's lock is above it.

    Requests are rows here. Which programs are compiled depends on the sizes a scheduler pads to, never on what a
    request holds; lists of blocks are padded to powers of two.
    """

    def __init__(self, config: KVCacheConfig, horizon: int = 0) -> None:
        """All blocks free; steps reserve blocks for up to ``horizon`` tokens ahead."""
        self._block_size = config.block_size
        self._horizon = horizon
        table_config = config.table_config()
        self._groups = config.groups
        self._width = table_config.max_num_blocks_per_req
        self.max_tokens_per_req = table_config.max_tokens_per_req
        self._row_capacity = self._width * len(self._groups)  # any one request fits
        # Where frees are put off, those of several requests come together.
        self._free_capacity = _FREED_IN_A_STEP if horizon else min(self._row_capacity, _FREED_IN_A_STEP)
        self._num_requests = table_config.max_num_reqs
        self._most_ahead = self._num_requests * (-(-horizon // config.block_size) + 1) * len(self._groups)
        self._marks = np.zeros(0, np.int32)  # blocks whose content became worth keeping since the last call
        self.may_copy = False  # set by the first fork: until then no block that is not full is ever shared
        self._state: GroupedRows = made_on_host(
            lambda: GroupedRows.create(config.pool_blocks, table_config, self._groups)
        )

    # -- a step ------------------------------------------------------------------------------------------------

    def begin_step(
        self,
        rows: np.ndarray,
        counts: np.ndarray,
        freed_rows: list[int],
        num_rows: int,
        num_tokens: int | None,
        *,
        restored: np.ndarray | None = None,
        hits: Hits | None = None,
        provisional: np.ndarray | None = None,
        used: np.ndarray | None = None,
        ahead: np.ndarray | None = None,
    ) -> StepUnderWay:
        """Free, extend and compute slots in one dispatch. Another thread works on it when this returns.

        Args:
            rows: i32[n], in the order of service.
            counts: i64[n], tokens to be computed.
            freed_rows: given up first.
            num_rows: to pad to.
            num_tokens: to pad to; None: decode layout.
            restored: i64[n], tokens each row gains besides, between its hits and those to be computed.
            hits: what empty rows begin with.
            provisional: i32[R], tokens of every row that may be taken back, so what they can't see may be needed again.
            used: i32[R], tokens that every row has gained since, in blocks it had.
            ahead: i64[n], tokens past those that each row gets blocks for.
        """
        last = self._free_all_but_the_last(freed_rows)
        if used is not None and freed_rows:
            used = used.copy()
            used[freed_rows] = 0  # some of them are empty by now
        computed = 0 if num_tokens is None else num_tokens
        if restored is not None and restored.any():
            computed += _power_of_four(int(restored.sum()))
        new_blocks = num_rows + computed // self._block_size + (restored is not None) * num_rows
        if self._horizon and num_tokens is None:
            new_blocks += num_rows * -(-self._horizon // self._block_size)
        marks_capacity = new_blocks * len(self._groups)  # as many as could have been filled since the last call
        if len(self._marks) > marks_capacity:
            self._flush_marks()
        # Admissions with hits, with frees, from the host: one program for all rather than one for each mixture.
        hits = _padded_hits(NO_HITS if hits is None and restored is not None else hits, num_rows)
        shape = StepShape(
            num_requests=self._num_requests,
            num_groups=len(self._groups),
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_marks=marks_capacity,
            free_capacity=self._free_capacity if last or hits is not None else 0,
            release_capacity=(num_rows + self._width) * len(self._groups) + (self._horizon > 0) * self._most_ahead,
            capacity=(new_blocks + self.may_copy * num_rows) * len(self._groups) + _num_hits(hits),
            copies=self.may_copy,
            max_tokens_per_req=self.max_tokens_per_req,
            reserves=self._horizon > 0,
        )
        words = pack(shape, rows, counts, restored, last, self._take_marks(), used, ahead)
        self._state, answer, tables = packed_step(self._state, words, hits, provisional, shape=shape)
        return StepUnderWay(answer, tables, shape, len(rows))

    def admit(
        self, rows: np.ndarray, counts: np.ndarray, hits: Hits | None = None, *, only_blocks: bool = False
    ) -> Extended:
        """Extend rows without computing slots; ``only_blocks``: they get the blocks, but not the tokens."""
        self._flush_marks()
        size = power_of_two(len(rows))
        hits = _padded_hits(hits, size)
        self._state, done = _admit(
            self._state,
            padded(rows, size),
            padded(counts, size, 0),
            hits,
            capacity=self._row_capacity * size + _num_hits(hits),
            copies=self.may_copy,
            only_blocks=only_blocks,
        )
        return _on_the_host(done, len(rows))

    # -- giving back -------------------------------------------------------------------------------------------

    def free(self, rows: list[int]) -> None:
        """Drop the references of whole rows."""
        self._flush_marks()
        capacity = max(self._row_capacity, self._free_capacity)
        while rows:
            blocks = np.cumsum(self.columns()[rows]) * len(self._groups)
            fit = max(int(np.searchsorted(blocks, capacity, side="right")), 1)
            self._state = _free(self._state, self._mask(rows[:fit]), capacity=capacity)
            rows = rows[fit:]

    def truncate(self, rows: np.ndarray, num_tokens: np.ndarray) -> None:
        """Forget what rows hold past ``num_tokens`` i32[n], which is no more than they hold."""
        self._flush_marks()
        size = power_of_two(len(rows))
        dropped = self.columns()[rows] - -(-num_tokens // self._block_size)
        self._state = _truncate(
            self._state,
            padded(rows, size),
            padded(num_tokens, size, 0),
            capacity=max(power_of_two(int(dropped.sum()) * len(self._groups)), 64),
        )

    def advance(self, used: np.ndarray, latest: np.ndarray) -> None:
        """Every row has gained ``used`` i32[R] tokens, in blocks it had, ``latest`` i32[R] of them in the last step.

        What was out of sight when that step began is given back, as the step would have done.
        """
        self._flush_marks()  # of blocks that are about to be free
        self._state = _advance(self._state, used, latest, capacity=self._most_ahead)

    def out_of_sight(self, used: np.ndarray, latest: np.ndarray, but: list[int]) -> list[np.ndarray]:
        """i32[...] for each group: the blocks that ``advance`` would give back, except of rows ``but``."""
        released = np.asarray(self._state.released).reshape(len(self._groups), -1)
        tokens, blocks = self.lengths() + used - latest, []
        for group, first, table in zip(self._groups, released, self.tables(), strict=True):
            wanted = (grouped_rows.first_column(group, tokens, self._block_size) - first).clip(0)
            wanted[but] = 0
            rows = np.repeat(np.arange(len(wanted)), wanted)
            nth = np.arange(len(rows)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
            blocks.append(table[rows, first[rows] + nth])
        return blocks

    def give_back(self, mask: np.ndarray) -> None:
        """Free what steps have reserved for the rows in ``mask`` bool[R]: their blocks past their tokens."""
        self._flush_marks()
        past = self.columns() - -(-self.lengths() // self._block_size)
        most = int(past[mask].sum()) * len(self._groups)  # more than reserved only where drafts left blocks behind
        self._state = _give_back(self._state, mask, capacity=max(self._most_ahead, power_of_two(most)))

    def fork(self, parent: int, child: int) -> None:
        """The empty row ``child`` shares what ``parent`` holds; a block that is not full is copied when written."""
        self._flush_marks()
        self.may_copy = True
        self._state = _fork(self._state, np.int32(parent), np.int32(child))

    # -- cached content ----------------------------------------------------------------------------------------

    def mark_cached(self, ids: np.ndarray) -> None:
        """Blocks in use whose content is worth keeping; takes effect with the next call, in the same dispatch."""
        self._marks = np.concatenate([self._marks, ids]) if len(self._marks) else ids

    def warm_up_marks(self, most: int) -> None:
        """Compile what ``mark_cached`` takes for up to ``most`` blocks, should no step follow."""
        size = _FEWEST_MARKS
        while True:
            self.mark_cached(np.full(size, -1, np.int32))
            self._flush_marks()
            if size >= most:
                return
            size *= 2

    def uncache(self, ids: np.ndarray) -> None:
        """Forget the content of blocks ``ids`` i32[n]."""
        self._flush_marks()
        if len(ids):
            self._state = _uncache(self._state, padded(ids))

    def rearrange(self, moved: GroupedRows) -> None:
        """Put a state in place of this one; see ``defragmentation``."""
        self._state = made_on_host(lambda: moved)

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> GroupedRows:
        """Pool and tables; valid until the next call."""
        self._flush_marks()
        return self._state

    def lengths(self) -> np.ndarray:
        """Tokens of every request, i32[R]; valid until the next call."""
        return np.asarray(self._state.table.num_tokens)[: self._num_requests]

    def columns(self) -> np.ndarray:
        """Columns of every request, i32[R]; valid until the next call."""
        return np.asarray(self._state.table.num_blocks)[: self._num_requests]

    def tables(self) -> np.ndarray:
        """Blocks of every request, i32[G, R, W]; valid until the next call."""
        return np.asarray(self._state.table.blocks).reshape(len(self._groups), self._num_requests, self._width)

    def blocks_of(self, row: int) -> np.ndarray:
        """Blocks of one request, i32[G, columns]; -1 where a group gave its block back. A copy."""
        return self.tables()[:, row, : self.columns()[row]].copy()

    def ref_counts(self) -> np.ndarray:
        """References of every block, i32[N]; valid until the next call."""
        return np.asarray(self._state.pool.ref_counts)

    def num_free(self) -> int:
        """Blocks that an admission could take."""
        return int(self._counters().num_free)

    def num_cached_free(self) -> int:
        """Those of them that have cached content."""
        return int(self._counters().num_cached)

    def check_invariants(self) -> None:
        """Raise ``InvalidBlockError`` where pool and tables contradict themselves or each other."""
        state = self.state
        check_invariants(state.pool, state.table, state.released)
        blocks, references = np.asarray(state.table.blocks), self.ref_counts()
        named = np.bincount(blocks[blocks >= 0], minlength=len(references))
        if (named != references).any():
            lost = np.flatnonzero(named != references)[:5]
            raise InvalidBlockError(
                f"blocks {lost.tolist()}: got {references[lost].tolist()} references, "
                f"want {named[lost].tolist()}, as often as rows name them"
            )

    # -- inside ------------------------------------------------------------------------------------------------

    def _counters(self) -> Counters:
        return Counters(*np.asarray(self._state.pool.counters))

    def _take_marks(self) -> np.ndarray:
        marks, self._marks = self._marks, np.zeros(0, np.int32)
        return marks

    def _flush_marks(self) -> None:
        if len(self._marks):
            marks = self._take_marks()
            self._state = _mark_cached(self._state, padded(marks, max(power_of_two(len(marks)), _FEWEST_MARKS)))

    def _mask(self, rows: list[int]) -> np.ndarray:
        mask = np.zeros(self._num_requests, bool)
        mask[rows] = True
        return mask

    def _free_all_but_the_last(self, rows: list[int]) -> list[int]:
        """Free so many of ``rows`` that the rest fits into a step's capacity; the rest."""
        if not rows:
            return rows
        blocks = np.cumsum(self.columns()[rows][::-1])[::-1] * len(self._groups)  # of this row and those after it
        first = int(np.searchsorted(-blocks, -self._free_capacity))
        if first:
            self.free(rows[:first])
        return rows[first:]


_jit = partial(jax.jit, donate_argnums=0, compiler_options=CONTROL_STEP_ON_CPU)


@partial(_jit, static_argnames=("capacity", "copies", "only_blocks"))
def _admit(
    state: GroupedRows,
    rows: jax.Array,
    counts: jax.Array,
    hits: Hits | None,
    *,
    capacity: int,
    copies: bool,
    only_blocks: bool,
) -> tuple[GroupedRows, Extension]:
    num_tokens = state.table.num_tokens
    state, done = grouped_rows.extend(state, rows, counts, capacity=capacity, hits=hits, copies=copies)
    if only_blocks:
        state = dataclasses.replace(state, table=dataclasses.replace(state.table, num_tokens=num_tokens))
    return state, done


@partial(_jit, static_argnames="capacity")
def _advance(state: GroupedRows, used: jax.Array, latest: jax.Array, *, capacity: int) -> GroupedRows:
    return grouped_rows.release_out_of_sight(grouped_rows.advance(state, used), latest, capacity=capacity)


_free = _jit(grouped_rows.free, static_argnames="capacity")
_truncate = _jit(grouped_rows.truncate, static_argnames="capacity")
_give_back = _jit(grouped_rows.give_back, static_argnames="capacity")
_fork = _jit(grouped_rows.fork)
_mark_cached = _jit(grouped_rows.mark_cached)
_uncache = _jit(grouped_rows.uncache)


def _on_the_host(done: Extension, num_rows: int) -> Extended:
    new_ids, evicted = np.asarray(done.new_ids), np.asarray(done.evicted)
    copies = (np.zeros(0, np.int32),) * 2
    if done.copy_src is not None:
        src, dst = np.asarray(done.copy_src), np.asarray(done.copy_dst)
        copies = src[src >= 0], dst[src >= 0]
    return Extended(np.asarray(done.ok)[:num_rows], new_ids[new_ids >= 0], new_ids[evicted], copies)


def _padded_hits(hits: Hits | None, num_rows: int) -> Hits | None:
    if hits is None:
        return None
    blocks = np.asarray(hits.blocks)
    return Hits(padded(blocks, _power_of_four(len(blocks))), padded(np.asarray(hits.columns), num_rows, 0))


def _num_hits(hits: Hits | None) -> int:
    return 0 if hits is None else hits.blocks.shape[0]


def _power_of_four(size: int) -> int:
    return 1 << max(-(-(size - 1).bit_length() // 2) * 2, 10)
