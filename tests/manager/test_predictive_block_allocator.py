"""``PredictiveBlockAllocator`` against counts kept by hand, and under pressure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyagent_kv_jax import (
    BlockAllocationStrategy,
    DoubleFreeError,
    InvalidArgumentError,
    InvalidBlockError,
    OutOfBlocksError,
    PredictiveBlockAllocator,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.growth_predictor import GrowthPredictor

BLOCKS = 16


class AllocatorMachine(RuleBasedStateMachine):
    """Blocks are given once, reserved ones count as free, and whoever fits without reserves is served with them."""

    @initialize(horizon=st.sampled_from([12, 4, 0]))
    def start(self, horizon: int) -> None:
        self.allocator = PredictiveBlockAllocator(BLOCKS, block_size=4, prediction_horizon=horizon, num_nodes=2)
        self.held: dict[str, list[int]] = {}
        self.shared: list[int] = []

    def references(self) -> list[int]:
        return [block for blocks in self.held.values() for block in blocks] + self.shared

    def reserved(self) -> list[int]:
        return [block for request in self.allocator._requests.values() for block in request.reserved.tolist()]

    @rule(
        name=st.sampled_from("abcd"),
        count=st.integers(0, 6),
        predict=st.booleans(),
        strategy=st.sampled_from([None, *BlockAllocationStrategy]),
    )
    def allocate(self, name: str, count: int, predict: bool, strategy: BlockAllocationStrategy | None) -> None:
        in_use = set(self.references())
        node = 1 if strategy == BlockAllocationStrategy.NUMA_AWARE else None
        try:
            ids = self.allocator.allocate(name, count, predict, strategy=strategy, node=node).tolist()
        except OutOfBlocksError:
            if strategy == BlockAllocationStrategy.CONTIGUOUS:
                free = sorted(set(range(BLOCKS)) - in_use)
                runs = np.split(free, np.flatnonzero(np.diff(free) != 1) + 1)
                assert max(map(len, runs)) < count
            else:
                assert count > BLOCKS - len(in_use)
            return
        assert len(set(ids)) == count
        assert not in_use & set(ids)
        if strategy == BlockAllocationStrategy.CONTIGUOUS:
            assert ids == list(range(ids[0], ids[0] + count)) if ids else True
        if count or name in self.held:
            self.held.setdefault(name, []).extend(ids)

    @rule(name=st.sampled_from("ab"), calls=st.integers(1, 3))
    def grow(self, name: str, calls: int) -> None:
        """Block by block: else hardly anything would ever be reserved."""
        for _ in range(calls):
            self.allocate(name, 1, True, None)

    @rule()
    def acquire_what_is_reserved(self) -> None:
        for block in self.reserved()[:1]:
            self.acquire(block)

    @rule(data=st.data(), everything=st.booleans())
    def free(self, data: st.DataObject, everything: bool) -> None:
        names = [name for name, blocks in self.held.items() if blocks]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        blocks = self.held[name]
        dropped = blocks if everything else blocks[: data.draw(st.integers(0, len(blocks)))]
        self.allocator.free(dropped)
        self.held[name] = [block for block in blocks if block not in dropped]

    @rule(block=st.integers(0, BLOCKS - 1))
    def acquire(self, block: int) -> None:
        self.allocator.acquire([block])
        self.shared.append(block)

    @rule()
    def drop_shared(self) -> None:
        self.allocator.free(self.shared)
        self.shared = []

    @rule(block=st.integers(-2, BLOCKS + 1))
    def free_what_is_not_held(self, block: int) -> None:
        if block not in self.references():
            before = self.allocator.num_reserved
            with pytest.raises(InvalidBlockError):
                self.allocator.free([block])
            assert self.allocator.num_reserved == before

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "allocator"):
            assert self.allocator.get_num_free() == BLOCKS - len(set(self.references()))
            reserved = self.reserved()
            assert self.allocator.num_reserved == len(reserved) == len(set(reserved) - set(self.references()))

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.free(self.references())
        for name in list(self.allocator._requests):  # those that were given nothing but a reserve
            self.allocator.finish(name)
        assert self.allocator.num_reserved == 0
        assert self.allocator.get_num_free() == BLOCKS


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def grow(allocator: PredictiveBlockAllocator, name: str, calls: int, predict: bool = True) -> list[int]:
    blocks = allocator.allocate(name, 3, predict).tolist()
    for _ in range(calls):
        blocks += allocator.allocate(name, 1, predict).tolist()
    return blocks


def test_what_is_reserved_saves_round_trips() -> None:
    trips = {}
    for predict in (False, True):
        allocator = PredictiveBlockAllocator(256, prediction_horizon=128)
        blocks = grow(allocator, "a", 40, predict)
        assert len(set(blocks)) == 43
        trips[predict] = allocator.round_trips
        assert allocator.prediction_hits + allocator.prediction_misses == 40
    assert trips[False] == 41
    assert trips[True] <= 10


def test_learns_where_requests_end() -> None:
    allocator = PredictiveBlockAllocator(256, block_size=16, prediction_horizon=160)
    for i in range(20):
        allocator.free(grow(allocator, f"r{i}", 3))
        assert (allocator.num_reserved, allocator.get_num_free()) == (0, 256)
    allocator.allocate("new", 3)
    assert allocator.num_reserved == 3  # as much as the others grew, though the horizon is ten blocks
    for _ in range(4):
        allocator.allocate("new", 1)
    assert allocator.num_reserved == 4  # further than all others: as much again


def test_reserves_are_given_back_before_anybody_is_refused() -> None:
    allocator = PredictiveBlockAllocator(20, prediction_horizon=1000)
    grow(allocator, "a", 7)
    assert allocator.num_reserved == 7
    assert len(allocator.allocate("b", allocator.get_num_free())) == 20 - 10
    assert allocator.num_reserved == 0
    with pytest.raises(OutOfBlocksError, match="want at most the 0 free"):
        allocator.allocate("a", 1)


def test_a_run_that_reserves_stand_in_is_found() -> None:
    allocator = PredictiveBlockAllocator(16, prediction_horizon=1000)
    grow(allocator, "a", 3)
    assert allocator.num_reserved == 3
    for count in (11, 2**31 - 1):  # refused, with the reserves as they were
        with pytest.raises(OutOfBlocksError, match="want at most 10, the longest run of the 10 free"):
            allocator.allocate("b", count, strategy=BlockAllocationStrategy.CONTIGUOUS)
    assert allocator.num_reserved == 3
    assert allocator.get_num_free() == 10
    assert len(allocator.allocate("b", 10, strategy=BlockAllocationStrategy.CONTIGUOUS)) == 10
    with pytest.raises(OutOfBlocksError, match="longest"):
        allocator.allocate("c", 1, strategy=BlockAllocationStrategy.CONTIGUOUS)


def test_a_reserved_block_counts_as_free() -> None:
    allocator = PredictiveBlockAllocator(16, prediction_horizon=1000)
    blocks = grow(allocator, "a", 3)
    (reserved, *_) = allocator._requests["a"].reserved.tolist()
    with pytest.raises(InvalidBlockError, match="in reserve"):
        allocator.free([reserved])
    free = allocator.get_num_free()
    allocator.acquire([reserved])
    assert allocator.get_num_free() == free - 1
    assert reserved not in grow(allocator, "b", 4) + blocks + allocator.allocate("a", 2).tolist()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda a: a.allocate("a", -1), InvalidArgumentError),
        (lambda a: a.allocate("a", 1, strategy=BlockAllocationStrategy.NUMA_AWARE, node=7), InvalidArgumentError),
        (lambda a: a.allocate("a", 1, strategy=BlockAllocationStrategy.PREDICTIVE, node=0), InvalidArgumentError),
        (lambda a: a.free([0]), DoubleFreeError),
        (lambda a: a.free([99]), InvalidBlockError),
        (lambda a: a.free([2**32]), InvalidBlockError),
        (lambda a: a.free(["x"]), InvalidBlockError),
        (lambda a: a.acquire([-1]), InvalidBlockError),
        (lambda a: a.finish("nobody"), UnknownRequestError),
        (lambda a: PredictiveBlockAllocator(8, block_size=0), InvalidArgumentError),
        (lambda a: PredictiveBlockAllocator(8, prediction_horizon=-1), InvalidArgumentError),
    ],
)
def test_bad_input(call, error) -> None:
    allocator = PredictiveBlockAllocator(8)
    with pytest.raises(error, match="want"):
        call(allocator)
    assert allocator.get_num_free() == 8


def test_predictor_takes_the_median_of_those_that_got_as_far() -> None:
    predictor = GrowthPredictor()
    assert predictor.remaining(np.array([0, 5])).tolist() == [np.inf, np.inf]
    for growth in [2] * 10 + [100] * 10:
        predictor.learn(growth)
    assert predictor.remaining(np.array([0, 2, 50, 100])).tolist() == [100, 98, 50, np.inf]
