"""Every form of table against a plain-Python model, one row at a time and in batches, right and wrong."""

from __future__ import annotations

import dataclasses
from itertools import chain

import chex
import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyagent_kv_jax import tables
from pyagent_kv_jax.errors import InvalidArgumentError, TableFullError
from pyagent_kv_jax.tables import BlockTable
from tests.tables.forms import ALL_NODES, BLOCK, CONFIG, FORMS, ROWS, WIDTH, dense, sparse, sparse_model
from tests.tables.sparse_checks import check_nodes
from tests.tables.table_model import Refusal, TableModel

FLAT = 12  # a static shape: every operation compiles once

_append_rows = jax.jit(tables.append_rows)
_clear_rows = jax.jit(tables.clear_rows)
_reorder_rows = jax.jit(tables.reorder_rows)
_release_rows = jax.jit(tables.release_rows, static_argnums=2)
_set_blocks = jax.jit(tables.set_blocks)
_step_slots = jax.jit(tables.step_slots, static_argnums=3)

a_row = st.integers(0, ROWS - 1)
any_row = st.one_of(a_row, a_row, a_row, st.integers(-2, ROWS + 1))
last_id = st.just((2**31 - 1) // BLOCK - 1)
too_large = last_id.map(lambda block: block + 1)
block_ids = st.lists(st.one_of(*[st.integers(0, 50)] * 6, st.integers(-2, 50), last_id, too_large), max_size=4)
any_column = st.one_of(st.integers(0, WIDTH - 1), st.integers(0, WIDTH - 1), st.integers(-1, WIDTH))
token_counts = st.one_of(st.integers(0, 6), st.integers(-2, 25))


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


@jax.jit
def observe(table, rows, positions):
    """All that can be read, in one program."""
    slots = tables.slots_of(table, rows, positions)
    named = i32([2, -1, 0, ROWS, 3, 1])
    return slots, table.to_dense_rows(named, 7), table.kernel_block_tables(named, 4), table.kernel_block_tables()


class TableMachine(RuleBasedStateMachine):
    """Dense; the other forms are below."""

    def __init__(self) -> None:
        super().__init__()
        self.table = dense()
        self.model = TableModel(ROWS, WIDTH, BLOCK)

    def attempt(self, error: Refusal, call) -> bool:
        """Call where it is right; where it is not, see it raise this error and leave the table alone."""
        if error is None:
            self.table = call()
            return True
        with pytest.raises(error, match="want"):
            call()
        return False

    def wrong_row(self, *rows: int) -> Refusal:
        return None if all(map(self.model.has_row, rows)) else InvalidArgumentError

    @rule(row=any_row, ids=block_ids, tokens=token_counts)
    def append_row(self, row, ids, tokens) -> None:
        wrong = self.model.why_not_append(row, ids, tokens)
        if self.attempt(wrong, lambda: self.table.append_row(row, ids, tokens)):
            self.model.append(row, ids, tokens)

    @rule(row=any_row, column=any_column, block=st.one_of(st.integers(-1, 50), last_id, too_large))
    def set_block(self, row, column, block) -> None:
        if self.attempt(
            self.model.why_not_set([(row, column, block)]), lambda: self.table.set_block(row, column, block)
        ):
            self.model.set(row, column, block)

    @rule(entries=st.lists(st.tuples(any_row, any_column, st.integers(-1, 50)), max_size=4), own=st.booleans())
    def set_blocks(self, entries, own) -> None:
        """Also of a right place: a list drawn at random is mostly wrong."""
        if own:
            entries = [(row % ROWS, column % WIDTH, abs(block)) for row, column, block in entries]
            entries = list({entry[:2]: entry for entry in entries}.values())
        padded = [*entries, *[(-1, 9, -1)] * (4 - len(entries))]
        new, ok = _set_blocks(self.table, *(i32(x) for x in zip(*padded, strict=True)))
        entries = [entry for entry in entries if entry[0] != -1]
        wrong = self.model.why_not_set(entries)
        assert ok == (wrong is None)
        if not self.attempt(wrong, lambda: self.table.set_blocks(*zip(*padded, strict=True))[0]):
            self.table = new  # as it was
            return
        for row, column, block in entries:
            self.model.set(row, column, block)

    @rule(row=any_row, position=st.integers(-1, WIDTH * BLOCK + 1))
    def read_one(self, row, position) -> None:
        right = self.model.has_row(row) and position >= 0
        for read, expected in ((self.table.get_block, self.model.block), (self.table.get_slot, self.model.slot)):
            if right:
                assert read(row, position) == expected(row, position)
            else:
                with pytest.raises(InvalidArgumentError, match="want"):
                    read(row, position)
        if right:
            assert self.table.to_dense(row, 3).tolist() == self.model.dense([row], 3)[0].tolist()
        rows, positions = [row, 0, 1, -1], [position, 1, -1, 0]
        for read, expected in ((self.table.get_blocks, self.model.block), (self.table.get_slots, self.model.slot)):
            assert read(rows, positions).tolist() == [expected(r, p) for r, p in zip(rows, positions, strict=True)]

    @rule(row=any_row)
    def clear_row(self, row) -> None:
        if self.attempt(self.wrong_row(row), lambda: self.table.clear_row(row)):
            self.model.clear(row)

    @rule(src=any_row, dst=any_row)
    def move_row(self, src, dst) -> None:
        wrong = self.wrong_row(src, dst)
        if not wrong and src != dst and self.model.blocks[dst]:
            wrong = InvalidArgumentError
        if self.attempt(wrong, lambda: self.table.move_row(src, dst)) and src != dst:
            self.model.reorder([dst], [src])
            self.model.clear(src)

    @rule(a=any_row, b=any_row)
    def swap_rows(self, a, b) -> None:
        if self.attempt(self.wrong_row(a, b), lambda: self.table.swap_rows(a, b)):
            self.model.reorder([a, b], [b, a])

    @rule(data=st.data())
    def append_rows(self, data) -> None:
        ids = [
            data.draw(
                st.lists(
                    st.one_of(st.integers(-1, 50), last_id, too_large) if r == 0 else st.integers(0, 50), max_size=3
                )
            )
            for r in range(ROWS)
        ]
        tokens = data.draw(st.lists(token_counts, min_size=ROWS, max_size=ROWS))
        rows = data.draw(st.one_of(st.none(), st.lists(any_row, min_size=ROWS, max_size=ROWS)))
        flat = list(chain(*ids))
        offsets = i32(np.cumsum([0, *map(len, ids)]))
        self.table, ok = _append_rows(
            self.table, i32(flat + [-1] * (FLAT - len(flat))), offsets, i32(tokens), None if rows is None else i32(rows)
        )
        named = list(range(ROWS)) if rows is None else rows
        free_nodes = self.model.num_free_nodes()
        for b, row in enumerate(named):
            if row == -1:
                assert ok[b] == (not ids[b] and tokens[b] == 0)
                continue
            wrong = InvalidArgumentError
            if named.count(row) == 1:
                wrong = self.model.why_not_append(row, ids[b], tokens[b], free_nodes)
            assert ok[b] == (wrong is None)
            if wrong in (None, TableFullError):  # what is refused for want of nodes stands in the way of later rows
                free_nodes -= self.model.lacking(row, self.model.new_columns(row, ids[b]))
            if wrong is None:
                self.model.append(row, ids[b], tokens[b])

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
        assert self.table.num_blocks.tolist() == list(map(len, self.model.blocks))
        assert self.table.num_tokens.tolist() == self.model.tokens
        rows, positions = (x.ravel() for x in np.meshgrid(np.arange(-1, ROWS + 1), np.arange(-1, WIDTH * BLOCK + 2)))
        slots, dense, kernel, all_kernel = observe(self.table, i32(rows), i32(positions))
        assert slots.tolist() == [self.model.slot(r, p) for r, p in zip(rows, positions, strict=True)]
        named = [2, -1, 0, ROWS, 3, 1]
        assert np.array_equal(dense, self.model.dense(named, 7))
        assert np.array_equal(kernel, self.model.kernel_blocks(named, 4, 2))
        assert np.array_equal(all_kernel, self.model.kernel_blocks(list(range(ROWS)), WIDTH, 2))
        self.check_storage()

    def check_storage(self) -> None:
        assert np.array_equal(self.table.blocks, self.model.dense())


class SparseTableMachine(TableMachine):
    """With room for everything, or so little that much is refused."""

    @initialize(num_nodes=st.sampled_from([ALL_NODES, ALL_NODES, 13, 7]))
    def make(self, num_nodes) -> None:
        self.table, self.model = sparse(num_nodes), sparse_model(num_nodes)

    def check_storage(self) -> None:
        check_nodes(self.table, self.model)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestSparseTableMachine = SparseTableMachine.TestCase
TestSparseTableMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_clearing_any_number_of_rows(num_rows):
    """More rows than are cleared together, and fewer."""
    rng = np.random.default_rng(num_rows)
    blocks, tokens = rng.integers(0, 99, (num_rows, WIDTH)), rng.integers(1, WIDTH * BLOCK, num_rows)
    table = BlockTable(blocks=i32(blocks), num_blocks=i32([WIDTH] * num_rows), num_tokens=i32(tokens), config=CONFIG)
    for wanted in {0, 1, num_rows // 2, num_rows}:
        mask = np.zeros(num_rows, bool)
        mask[rng.permutation(num_rows)[:wanted]] = True
        cleared = _clear_rows(table, mask)
        assert np.array_equal(cleared.blocks, np.where(mask[:, None], -1, blocks))
        assert np.array_equal(cleared.num_tokens, np.where(mask, 0, tokens))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offsets", [[1, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, FLAT + 1], [0, -1, 0, 1, 1]])
def test_offsets_that_are_none_append_nothing(offsets, form):
    table = FORMS[form]().append_row(1, [7], 2)
    after, ok = _append_rows(table, np.arange(FLAT, dtype=np.int32), i32(offsets), i32([0] * ROWS), None)
    assert not ok.any()
    chex.assert_trees_all_equal(after, table)


def test_rows_that_find_no_nodes_stand_in_the_way_of_later_ones():
    """4 nodes, 4 more, 3, none: of 7."""
    table, ok = _append_rows(sparse(7), np.arange(FLAT, dtype=np.int32), i32([0, 3, 6, 7, 7]), i32([9, 9, 1, 0]), None)
    assert ok.tolist() == [True, False, False, True]
    model = sparse_model(7)
    model.append(0, [0, 1, 2], 9)
    check_nodes(table, model)


def test_a_refused_row_takes_no_part_in_another_rows_nodes():
    """Nothing named -1 is a row; what would be written there looks as if it were meant for row 0."""
    ids, tokens = np.arange(FLAT, dtype=np.int32), i32([1, 9, 0, 0])
    table, ok = _append_rows(sparse(), ids, i32([0, 1, 4, 4, 4]), tokens, i32([-1, 0, -1, -1]))
    assert ok.tolist() == [False, True, True, True]
    model = sparse_model()
    model.append(0, [1, 2, 3], 9)
    check_nodes(table, model)


@jax.jit
def _append_over_ranks(table, ids, offsets, tokens, size):
    return tables.append_rows(table, ids, offsets, tokens, context_parallel_size=size)


@jax.jit
def _of_rank(table, rows, positions, layout):
    """Slots of the tokens, and how many of the tokens up to each the rank holds."""
    return tables.slots_of(table, rows, positions, layout), tables.local_length(positions + 1, layout)


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_slots_and_lengths(size, interleave):
    """Each token lives on one rank, in a slot of its own, and the ranks' lengths add up."""
    interleaved = dataclasses.replace(CONFIG, cp_kv_cache_interleave_size=interleave)
    layouts = [BlockTable.create(interleaved).context_parallel(size, rank) for rank in range(size)]
    num_tokens, blocks = 2 * BLOCK * size + 5, i32([7, 3, 9])
    table, ok = _append_over_ranks(dense(), blocks, i32([0, 0, 3, 3, 3]), i32([0, num_tokens, 0, 0]), size)
    assert ok.all()
    positions = np.arange(30, dtype=np.int32)
    slots, lengths = zip(
        *(_of_rank(table, np.full_like(positions, 1), positions, layout) for layout in layouts), strict=True
    )
    next_place = [0] * size
    for position in range(num_tokens):  # dealt out by hand: interleave tokens to each rank in turn
        rank = position // interleave % size
        place, next_place[rank] = next_place[rank], next_place[rank] + 1
        expected = np.full(size, -1)
        expected[rank] = blocks[place // BLOCK] * BLOCK + place % BLOCK
        assert [int(of_rank[position]) for of_rank in slots] == expected.tolist()
        assert [int(of_rank[position]) for of_rank in lengths] == next_place
    assert all((of_rank[num_tokens:] == -1).all() for of_rank in slots)
