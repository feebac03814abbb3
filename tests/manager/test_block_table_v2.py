"""``BlockTableV2`` in every form against the model of a table, with references counted by hand."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyagent_kv_jax import (
    BlockAllocationStrategy,
    BlockTable,
    BlockTableConfig,
    BlockTableFactory,
    BlockTableV2,
    ConfigError,
    DuplicateRequestError,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheError,
    OutOfBlocksError,
    RequestTooLongError,
    SparseBlockTable,
    TableFullError,
    UnknownRequestError,
)
from tests.distributed.meshes import cpu_mesh
from tests.tables.table_model import TableModel

ROWS, WIDTH, BLOCK, BLOCKS = 4, 5, 4, 12
CONFIG = BlockTableConfig(BLOCK, ROWS, WIDTH)
DEVICES, PER_DEVICE = 6, 2  # few each: rows spill often
FORMS = [
    (sparse, prediction, devices)
    for sparse in (False, True)
    for prediction in (False, True)
    for devices in (0, DEVICES)
]

any_row = st.one_of(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.integers(-1, ROWS))
names = st.sampled_from("abcd")
STRATEGIES = [None, None, BlockAllocationStrategy.SCATTERED, BlockAllocationStrategy.PREDICTIVE]


class V2Machine(RuleBasedStateMachine):
    @initialize(form=st.sampled_from(FORMS))
    def make(self, form) -> None:
        sparse, prediction, self.devices = form
        mesh = cpu_mesh(own=DEVICES) if self.devices else None
        self.v2 = BlockTableV2(
            CONFIG, sparse, prediction, num_blocks=BLOCKS, prediction_horizon=12, mesh=mesh, axis="own"
        )
        self.spilled = 0
        self.model = TableModel(ROWS, WIDTH, BLOCK)
        self.row_of: dict[str, int] = {}
        self.given = self.returned = 0
        self.kept: list[tuple[BlockTable | SparseBlockTable, np.ndarray]] = []

    def attempt(self, error: type[KVCacheError] | None, call):
        if error is None:
            return call()
        with pytest.raises(error, match="want"):
            call()
        return None

    def clear(self, row: int) -> None:
        self.returned += len(self.model.blocks[row])
        self.model.clear(row)
        self.row_of = {name: at for name, at in self.row_of.items() if at != row}

    @rule(row=any_row, ids=st.lists(st.integers(-1, BLOCKS), max_size=3), tokens=st.integers(-1, 13))
    def append_row(self, row, ids, tokens) -> None:
        wrong = self.model.why_not_append(row, ids, tokens)
        if not wrong and any(block >= BLOCKS for block in ids):
            wrong = InvalidBlockError
        self.attempt(wrong, lambda: self.v2.append_row(row, ids, tokens))
        if not wrong:
            self.model.append(row, ids, tokens)
            self.given += len(ids)

    @rule(
        name=names,
        row=any_row,
        count=st.integers(-1, 4),
        tokens=st.one_of(st.none(), st.integers(-1, 9)),
        strategy=st.sampled_from(STRATEGIES),
        own=st.booleans(),
        node=st.sampled_from([None, None, None, 0, 2, -1, DEVICES]),
    )
    def allocate_for_request(self, name, row, count, tokens, strategy, own, node) -> None:
        row, node = self.row_of.get(name, row) if own else row, node if self.devices else None
        wrong = self.why_not_allocate(name, row, count, tokens, node)
        near, places = (-1, []) if wrong or not self.devices else self.places(name, row, count, strategy, node)
        ids = self.attempt(
            wrong,
            lambda: self.v2.allocate_for_request(name, row, count, num_tokens=tokens, strategy=strategy, node=node),
        )
        if wrong:
            return
        assert len(ids) == count
        assert not set(ids.tolist()) & self.used()
        if self.devices:
            assert (ids // PER_DEVICE).tolist() == places
            self.spilled += sum(device != near for device in places) if near >= 0 else 0
        room = (len(self.model.blocks[row]) + count) * BLOCK - self.model.tokens[row]
        self.model.append(row, ids.tolist(), room if tokens is None else tokens)
        self.row_of[name] = row
        self.given += count

    @rule(name=names, calls=st.integers(1, 3))
    def grow(self, name, calls) -> None:
        """Block by block: else hardly anything would ever be reserved."""
        for _ in range(calls):
            self.allocate_for_request(name, "abcd".index(name), 1, None, None, True, None)

    @rule(row=any_row)
    def append_a_reserved_block(self, row) -> None:
        for block in self.reserved()[:1]:
            self.append_row(row, [block], 0)

    def reserved(self) -> list[int]:
        return [block for request in self.v2._allocator._requests.values() for block in request.reserved.tolist()]

    def places(self, name, row, count, strategy, node) -> tuple[int, list[int]]:
        """The device that comes first, -1 for none, and that of each new block, one block after another."""
        requests = self.v2._allocator._requests
        own = requests[name].reserved.tolist() if name in requests else []
        left = [0] * DEVICES
        for block in set(range(BLOCKS)) - self.used() - set(self.reserved()):
            left[block // PER_DEVICE] += 1
        if node is None and strategy is not BlockAllocationStrategy.SCATTERED:
            blocks = self.model.blocks[row]
            node = blocks[-1] // PER_DEVICE if blocks else max(range(DEVICES), key=lambda device: left[device])
        near = -1 if node is None else node
        if sum(left) < count - len(own):  # the reserves of others are given back
            for block in set(self.reserved()) - set(own):
                left[block // PER_DEVICE] += 1
        places = [block // PER_DEVICE for block in own[:count]]
        others = sorted((d for d in range(DEVICES) if d != near), key=lambda d: -left[d])
        order = [device for d in [near, *others] if d >= 0 for device in [d] * left[d]]
        return near, places + order[: count - len(places)]

    def why_not_allocate(self, name, row, count, tokens, node) -> type[KVCacheError] | None:
        if not self.model.has_row(row) or any(at == row and other != name for other, at in self.row_of.items()):
            return InvalidArgumentError
        if self.row_of.get(name, row) != row:
            return DuplicateRequestError
        if count < 0 or node in (-1, DEVICES):
            return InvalidArgumentError
        wrong = self.model.why_not_append(row, [0] * count, tokens or 0)
        return wrong or (OutOfBlocksError if count > BLOCKS - len(self.used()) else None)

    def used(self) -> set[int]:
        return set(self.references())

    def references(self) -> Counter[int]:
        return Counter(block for blocks in self.model.blocks for block in blocks)

    @rule(row=any_row)
    def clear_row(self, row) -> None:
        wrong = None if self.model.has_row(row) else InvalidArgumentError
        self.attempt(wrong, lambda: self.v2.clear_row(row))
        if not wrong:
            self.clear(row)

    @rule(name=names)
    def free_request(self, name) -> None:
        wrong = None if name in self.row_of else UnknownRequestError
        self.attempt(wrong, lambda: self.v2.free_request(name))
        if not wrong:
            self.clear(self.row_of[name])

    @rule(row=any_row, num_tokens=st.integers(-1, 8), start=st.integers(-1, 20))
    def compute_slot_mapping(self, row, num_tokens, start) -> None:
        right = self.model.has_row(row) and num_tokens >= 0 and 0 <= start <= self.model.tokens[row] - num_tokens
        wrong = None if right else InvalidArgumentError
        mapping = self.attempt(wrong, lambda: self.v2.compute_slot_mapping(row, num_tokens, start))
        if right:
            assert mapping.slots.tolist() == [self.model.slot(row, start + i) for i in range(num_tokens)]

    @rule()
    def keep_the_table(self) -> None:
        self.kept.append((self.v2.table, self.model.dense()))

    @invariant()
    def agrees(self) -> None:
        for row in range(ROWS):
            assert self.v2.get_row(row).tolist() == self.model.dense([row])[0].tolist()
        stats = self.v2.get_stats()
        slots, tokens = sum(map(len, self.model.blocks)) * BLOCK, sum(self.model.tokens)
        assert (stats.num_blocks, stats.num_used_blocks) == (BLOCKS, len(self.used()))
        assert stats.num_free_blocks == BLOCKS - len(self.used())
        reserved = self.reserved()
        assert stats.num_reserved_blocks == len(reserved) == len(set(reserved) - self.used())
        references, counts = self.v2._allocator._pool.ref_counts(), self.references()
        assert all(references[block] == count for block, count in counts.items())
        assert references.sum() == counts.total() + stats.num_reserved_blocks
        assert stats.num_requests == len(self.row_of)
        assert self.row_of or not stats.num_reserved_blocks
        assert (stats.num_allocations, stats.num_frees) == (self.given, self.returned)
        assert stats.num_empty_slots == slots - tokens
        assert stats.empty_slot_share == ((slots - tokens) / slots if slots else 0.0)
        assert stats.table_bytes == self.v2._rows.methods.nbytes
        used = tuple(sum(block // PER_DEVICE == device for block in self.used()) for device in range(self.devices))
        assert (stats.num_used_by_device, stats.num_spilled) == (used, self.spilled)

    def teardown(self) -> None:
        """Handed-out tables are what they were; nothing is left of rows that were cleared."""
        if not hasattr(self, "v2"):
            return
        for table, dense in self.kept:
            assert np.array_equal(table.to_dense_rows(range(ROWS), WIDTH), dense)
        for row in range(ROWS):
            self.v2.clear_row(row)
        stats = self.v2.get_stats()
        assert (stats.num_free_blocks, stats.num_reserved_blocks, stats.num_requests) == (BLOCKS, 0, 0)
        assert not self.v2._allocator._pool.ref_counts().any()


TestV2Machine = V2Machine.TestCase
TestV2Machine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("sparse", [False, True])
def test_prediction_serves_what_was_reserved(sparse):
    """Requests that grow block by block; after the first have ended, later ones find their blocks waiting."""
    stats = {}
    for prediction in (False, True):
        v2 = BlockTableV2(CONFIG, sparse, prediction, num_blocks=BLOCKS, prediction_horizon=16)
        for name in map(str, range(30)):
            for _ in range(WIDTH):
                v2.allocate_for_request(name, 1, 1, num_tokens=BLOCK)
            v2.free_request(name)
        stats[prediction] = v2.get_stats()
        assert stats[prediction].num_free_blocks == BLOCKS
    asked_again = 30 * (WIDTH - 1)
    assert (stats[False].num_prediction_hits, stats[False].num_prediction_misses) == (0, asked_again)
    assert stats[True].num_prediction_hits + stats[True].num_prediction_misses == asked_again
    assert stats[True].num_prediction_hits > asked_again // 2


def test_strategies_are_chosen_call_by_call_and_refused_as_the_pool_refuses():
    v2 = BlockTableV2(CONFIG, num_blocks=BLOCKS, num_nodes=2)
    v2.append_row(0, [2, 5, 8], 12)
    ids = v2.allocate_for_request("a", 1, 3, strategy=BlockAllocationStrategy.CONTIGUOUS)
    assert ids.tolist() == [9, 10, 11]
    before = v2.get_stats()
    with pytest.raises(OutOfBlocksError, match="want at most 2, the longest run of the 6 free blocks"):
        v2.allocate_for_request("c", 3, 3, strategy=BlockAllocationStrategy.CONTIGUOUS)
    with pytest.raises(InvalidArgumentError, match="node"):
        v2.allocate_for_request("c", 3, 1, node=1)
    with pytest.raises(RequestTooLongError, match=f"got {2**30} more blocks, want at most 5"):
        v2.allocate_for_request("c", 3, 2**30)
    assert v2.get_stats() == before
    assert v2.get_row(3).tolist() == [-1] * WIDTH


def test_a_sparse_table_past_its_capacity():
    """Two blocks, and nodes for two rows: a third row that shares one of them finds no room."""
    v2 = BlockTableFactory.create_v2(BLOCK, True, max_num_reqs=ROWS, max_blocks_per_req=WIDTH, num_blocks=2)
    v2.append_row(0, [0], 4)
    v2.append_row(1, [0], 4)
    before = v2.get_stats()
    for call in (lambda: v2.append_row(2, [0], 4), lambda: v2.allocate_for_request("a", 2, 1)):
        with pytest.raises(TableFullError, match="need 1 more nodes, want at most the 0 free"):
            call()
    assert v2.get_stats() == before
    v2.clear_row(0)
    v2.append_row(2, [0], 4)
    assert v2.get_row(2).tolist() == [0, -1, -1, -1, -1]


def test_a_request_ends_with_its_row_though_its_blocks_live_on():
    v2 = BlockTableV2(CONFIG, use_prediction=True, num_blocks=BLOCKS)
    for _ in range(2):
        held = v2.allocate_for_request("a", 0, 1)
    assert v2.get_stats().num_reserved_blocks == 1  # as many as it has grown
    v2.append_row(1, held, BLOCK)
    v2.clear_row(0)
    stats = v2.get_stats()
    assert (stats.num_reserved_blocks, stats.num_used_blocks, stats.num_requests) == (0, 1, 0)
    assert held[0] not in v2.allocate_for_request("a", 2, 5)


def test_only_a_table_handed_out_is_copied():
    v2 = BlockTableV2(CONFIG, num_blocks=BLOCKS)
    kept = v2.table
    v2.append_row(0, [1], 1)
    not_kept = v2._rows.methods
    v2.append_row(0, [2], 4)
    assert not_kept.num_blocks.is_deleted()
    assert kept.num_blocks.tolist() == [0] * ROWS


def test_threads_that_fill_and_free_rows_of_their_own():
    v2 = BlockTableV2(CONFIG, use_prediction=True, num_blocks=BLOCKS)
    errors: list[Exception] = []

    def work(row: int) -> None:
        try:
            for turn in range(10):
                for _ in range(3):
                    v2.allocate_for_request(f"{row}, {turn}", row, 1)
                held = v2.get_row(row)[:3].tolist()
                assert len(set(held)) == 3
                v2.free_request(f"{row}, {turn}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(ROWS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stats = v2.get_stats()
    assert (stats.num_free_blocks, stats.num_reserved_blocks, stats.num_allocations) == (BLOCKS, 0, ROWS * 30)


def test_the_factory_makes_every_form():
    standard = BlockTableFactory.create_standard(8, 3, 6, kernel_block_size=4)
    assert isinstance(standard, BlockTable)
    assert standard.blocks.shape == (3, 6)
    assert standard.append_row(1, [2], 1).kernel_block_tables([1], 1).tolist() == [[4, 5]]
    sparse = BlockTableFactory.create_sparse(8)
    assert isinstance(sparse, SparseBlockTable)
    assert (sparse.config.block_size, sparse.num_rows, sparse.width) == (8, 256, 8192)
    assert sparse.nbytes * 20 < 256 * 8192 * 4
    v2 = BlockTableFactory.create_v2(8, True, True, max_num_reqs=300)
    assert isinstance(v2.table, SparseBlockTable)
    assert v2.get_stats().num_blocks == 65_536
    assert BlockTableFactory.create_v2(max_num_reqs=2).get_stats().num_blocks == 1024
    with pytest.raises(ConfigError, match="want at most 32767, so that slots fit int32"):
        BlockTableFactory.create_v2(2**16, num_blocks=2**15)
    with pytest.raises(ConfigError, match="num_nodes: got 5"):
        BlockTableFactory.create_v2(num_nodes=5)
    with pytest.raises(ConfigError, match="kernel_block_size"):
        BlockTableFactory.create_standard(16, kernel_block_size=5)
