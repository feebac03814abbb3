"""The table against its plain-Python model, one row at a time and in batches, right and wrong."""

from __future__ import annotations

from functools import partial
from itertools import chain

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyagent_kv_jax import tables
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import InvalidArgumentError, KVCacheError
from pyagent_kv_jax.tables import BlockTable
from tests.tables.table_model import TableModel

ROWS, WIDTH, BLOCK, FLAT = 4, 5, 4, 12  # static shapes: every operation compiles once

_append_rows = jax.jit(tables.append_rows)
_clear_rows = jax.jit(tables.clear_rows)
_reorder_rows = jax.jit(tables.reorder_rows)
_release_rows = jax.jit(tables.release_rows, static_argnums=2)
_slots_of = jax.jit(tables.slots_of)
_step_slots = jax.jit(tables.step_slots, static_argnums=3)

a_row = st.integers(0, ROWS - 1)
any_row = st.one_of(a_row, a_row, a_row, st.integers(-2, ROWS + 1))
block_ids = st.lists(st.one_of(st.integers(0, 50), st.integers(0, 50), st.integers(-2, 50)), max_size=4)
token_counts = st.one_of(st.integers(0, 6), st.integers(-2, 25))


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable.create(BlockTableConfig(BLOCK, ROWS, WIDTH))
        self.model = TableModel(ROWS, WIDTH, BLOCK)

    def attempt(self, right: bool, call) -> bool:
        """Call where it is right; where it is not, see it raise and leave the table alone."""
        if right:
            self.table = call()
            return True
        with pytest.raises(KVCacheError, match="want"):
            call()
        return False

    @rule(row=any_row, ids=block_ids, tokens=token_counts)
    def append_row(self, row, ids, tokens) -> None:
        right = 0 <= row < ROWS and self.model.can_append(row, ids, tokens)
        if self.attempt(right, lambda: self.table.append_row(row, ids, tokens)):
            self.model.append(row, ids, tokens)

    @rule(row=any_row)
    def clear_row(self, row) -> None:
        if self.attempt(0 <= row < ROWS, lambda: self.table.clear_row(row)):
            self.model.clear(row)

    @rule(src=any_row, dst=any_row)
    def move_row(self, src, dst) -> None:
        inside = 0 <= src < ROWS and 0 <= dst < ROWS
        right = inside and (src == dst or not self.model.blocks[dst])
        if self.attempt(right, lambda: self.table.move_row(src, dst)) and src != dst:
            self.model.reorder([dst], [src])
            self.model.clear(src)

    @rule(a=any_row, b=any_row)
    def swap_rows(self, a, b) -> None:
        if self.attempt(0 <= a < ROWS and 0 <= b < ROWS, lambda: self.table.swap_rows(a, b)):
            self.model.reorder([a, b], [b, a])

    @rule(data=st.data())
    def append_rows(self, data) -> None:
        ids = [
            data.draw(st.lists(st.integers(-1, 50) if r == 0 else st.integers(0, 50), max_size=3)) for r in range(ROWS)
        ]
        tokens = data.draw(st.lists(token_counts, min_size=ROWS, max_size=ROWS))
        rows = data.draw(st.one_of(st.none(), st.lists(any_row, min_size=ROWS, max_size=ROWS)))
        flat = list(chain(*ids))
        offsets = i32(np.cumsum([0, *map(len, ids)]))
        self.table, ok = _append_rows(
            self.table, i32(flat + [-1] * (FLAT - len(flat))), offsets, i32(tokens), None if rows is None else i32(rows)
        )
        named = list(range(ROWS)) if rows is None else rows
        for b, row in enumerate(named):
            if row == -1:
                assert ok[b] == (not ids[b] and tokens[b] == 0)
            elif 0 <= row < ROWS and named.count(row) == 1:
                assert ok[b] == self.model.append(row, ids[b], tokens[b])
            else:
                assert not ok[b]

    @rule(mask=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    def clear_rows(self, mask) -> None:
        self.table = _clear_rows(self.table, np.array(mask))
        for row in np.flatnonzero(mask):
            self.model.clear(row)

    @rule(mask=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    def release_rows(self, mask) -> None:
        """Tail first, and a row that does not fit into the capacity of 8 keeps what it has."""
        self.table, released = _release_rows(self.table, np.array(mask), 8)
        asked = np.cumsum([len(blocks) * wanted for blocks, wanted in zip(self.model.blocks, mask, strict=True)])
        expected = []
        for row in range(ROWS):
            has_room = asked[row] <= 8 or not (mask[row] and self.model.blocks[row])
            assert released.ok[row] == has_room
            if mask[row] and has_room:
                expected += self.model.blocks[row][::-1]
                self.model.clear(row)
            assert released.row_offsets[row + 1] == len(expected)
        assert released.ids.tolist() == expected + [-1] * (8 - len(expected))

    @rule(dst=st.permutations(range(ROWS)), src=st.permutations(range(ROWS)), wrong=st.integers(0, 5))
    def reorder_rows(self, dst, src, wrong) -> None:
        src = [dst[0] if wrong == 0 else src[0], *src[1:]]
        self.table, ok = _reorder_rows(self.table, i32(dst), i32(src))
        assert ok == (len(set(src)) == ROWS)
        if ok:
            self.model.reorder(list(dst), src)

    @rule(row=any_row, num_tokens=st.integers(-1, 21), start=st.integers(-1, 20))
    def compute_slot_mapping(self, row, num_tokens, start) -> None:
        right = 0 <= row < ROWS and num_tokens >= 0 and start >= 0 and start + num_tokens <= self.model.tokens[row]
        if not right:
            with pytest.raises(InvalidArgumentError, match="want"):
                self.table.compute_slot_mapping(row, num_tokens, start)
            return
        mapping = self.table.compute_slot_mapping(row, num_tokens, start)
        assert mapping.slots.tolist() == [self.model.slot(row, start + i) for i in range(num_tokens)]

    @rule(lengths=st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS))
    def step_slots(self, lengths) -> None:
        """The last tokens of every row; 10 in all, and rows past that are left out."""
        lengths = [min(n, held) for n, held in zip(lengths, self.model.tokens, strict=True)]
        starts = [held - n for n, held in zip(lengths, self.model.tokens, strict=True)]
        step = _step_slots(self.table, i32(starts), i32(lengths), 10)
        ok = [n == 0 or total <= 10 for n, total in zip(lengths, np.cumsum(lengths), strict=True)]
        expected = [(r, starts[r] + i) for r in range(ROWS) if ok[r] for i in range(lengths[r])]
        padding = 10 - len(expected)
        assert step.ok.tolist() == ok
        assert step.rows.tolist() == [r for r, _ in expected] + [-1] * padding
        assert step.positions.tolist() == [p for _, p in expected] + [0] * padding
        assert step.slots.tolist() == [self.model.slot(r, p) for r, p in expected] + [-1] * padding
        assert (
            step.query_start_loc.tolist() == np.cumsum([0, *(n * f for n, f in zip(lengths, ok, strict=True))]).tolist()
        )

    @invariant()
    def agrees(self) -> None:
        assert np.array_equal(self.table.blocks, self.model.dense())
        assert self.table.num_blocks.tolist() == list(map(len, self.model.blocks))
        assert self.table.num_tokens.tolist() == self.model.tokens
        rows, positions = np.meshgrid(np.arange(-1, ROWS + 1), np.arange(-1, WIDTH * BLOCK + 2))
        slots = _slots_of(self.table, i32(rows.ravel()), i32(positions.ravel()))
        expected = [self.model.slot(r, p) for r, p in zip(rows.ravel(), positions.ravel(), strict=True)]
        assert slots.tolist() == expected


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_clearing_any_number_of_rows(num_rows):
    """More rows than are cleared together, and fewer."""
    rng = np.random.default_rng(num_rows)
    table = BlockTable.create(BlockTableConfig(BLOCK, num_rows, WIDTH))
    for row in range(num_rows):
        table = table.append_row(row, rng.integers(0, 99, row % WIDTH + 1), 1)
    for wanted in {0, 1, num_rows // 2, num_rows}:
        mask = np.zeros(num_rows, bool)
        mask[rng.permutation(num_rows)[:wanted]] = True
        cleared = _clear_rows(table, mask)
        assert np.array_equal(cleared.blocks, np.where(mask[:, None], -1, table.blocks))
        assert np.array_equal(cleared.num_tokens, np.where(mask, 0, table.num_tokens))


@pytest.mark.parametrize("offsets", [[1, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, FLAT + 1], [0, -1, 0, 1, 1]])
def test_offsets_that_are_none_append_nothing(offsets):
    table = BlockTable.create(BlockTableConfig(BLOCK, ROWS, WIDTH)).append_row(1, [7], 2)
    after, ok = _append_rows(table, np.arange(FLAT, dtype=np.int32), i32(offsets), i32([0] * ROWS), None)
    assert not ok.any()
    assert np.array_equal(after.blocks, table.blocks)
    assert np.array_equal(after.num_blocks, table.num_blocks)


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_slots_and_lengths(size, interleave):
    """Each token lives on one rank, in a slot of its own, and the ranks' lengths add up."""
    table = BlockTable.create(BlockTableConfig(BLOCK, 2, WIDTH, cp_kv_cache_interleave_size=interleave))
    num_tokens, blocks = 2 * BLOCK * size + 5, i32([7, 3, 9])
    append = partial(tables.append_rows, context_parallel_size=size)
    table, ok = jax.jit(append)(table, blocks, i32([0, 0, 3]), i32([0, num_tokens]))
    assert ok.tolist() == [True, True]
    rows, positions = np.full(num_tokens + 1, 1, np.int32), np.arange(num_tokens + 1, dtype=np.int32)
    slots_at = jax.jit(lambda rank: tables.slots_of(table, rows, positions, table.context_parallel(size, rank)))
    length_at = jax.jit(lambda n, rank: tables.local_length(n, table.context_parallel(size, rank)))
    slots = np.stack([slots_at(rank) for rank in range(size)])
    next_place = [0] * size
    for position in range(num_tokens):  # dealt out by hand: interleave tokens to each rank in turn
        rank = position // interleave % size
        place, next_place[rank] = next_place[rank], next_place[rank] + 1
        expected = np.full(size, -1)
        expected[rank] = blocks[place // BLOCK] * BLOCK + place % BLOCK
        assert slots[:, position].tolist() == expected.tolist()
        assert [int(length_at(position + 1, r)) for r in range(size)] == next_place
    assert (slots[:, num_tokens] == -1).all()
