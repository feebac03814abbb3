"""The pool against its plain-Python model: small, so that exhaustion, eviction, holes and wrap-around are common."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.pool import Admission, BlockPool, allocate_blocks, check_invariants, longest_free_run
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU
from tests.pool.pool_model import PoolModel

ROWS, CAPACITY, HITS, BATCH = 3, 9, 8, 10  # static shapes: every operation compiles once for each pool size

STRATEGY_BLOCKS, NODES = 9, 3  # the strategies are tried on the larger pool

# Traced, so that a refusal comes back as ``ok`` rather than as an error.
_jit = partial(jax.jit, compiler_options=CONTROL_STEP_ON_CPU)  # compiles in half the time
_admit = _jit(BlockPool.admit, static_argnames="capacity")
_allocate = _jit(BlockPool.allocate, static_argnames="capacity")
_free = _jit(lambda pool, ids: pool.free(ids))
_mark_cached = _jit(lambda pool, ids: pool.mark_cached(ids))
_uncache = _jit(lambda pool, ids: pool.uncache(ids))
_share = _jit(lambda pool, ids: pool.share(ids))
_take = _jit(lambda pool, ids: pool.take(ids))
_allocate_runs = jax.jit(partial(allocate_blocks, capacity=CAPACITY, strategy=BlockAllocationStrategy.CONTIGUOUS))


_allocate_near = jax.jit(
    partial(allocate_blocks, strategy=BlockAllocationStrategy.NUMA_AWARE), static_argnames=("num_nodes", "capacity")
)


_COUNTS = st.lists(st.sampled_from([0, 1, 1, 2, 3, -1, 2**31 - 1]), min_size=ROWS, max_size=ROWS)


def padded(values: list[int], length: int) -> np.ndarray:
    """i32[length], padding -1."""
    return np.array(values + [-1] * (length - len(values)), np.int32)


def same_admission(admitted: Admission, expected, capacity: int) -> None:
    """What a pool and its model gave to the same rows."""
    ids, evicted, ok = expected
    assert admitted.ok.tolist() == ok
    assert admitted.row_offsets.tolist() == np.cumsum([0, *map(len, ids)]).tolist()
    assert admitted.ids.tolist() == padded(list(chain(*ids)), capacity).tolist()
    assert np.flatnonzero(admitted.evicted).tolist() == np.flatnonzero(list(chain(*evicted))).tolist()


def near_both(pool: BlockPool, model: PoolModel, counts, nodes, num_nodes: int, capacity: int) -> BlockPool:
    """As ``admit_both``, by nodes."""
    nodes_given = np.array(nodes, np.int32)
    pool, admitted = _allocate_near(
        pool, np.array(counts, np.int32), node=nodes_given, num_nodes=num_nodes, capacity=capacity
    )
    same_admission(admitted, model.allocate_near(counts, nodes, num_nodes, capacity), capacity)
    return pool


def admit_both(pool: BlockPool, model: PoolModel, counts, hits, order, capacity: int, num_hits: int) -> BlockPool:
    """Admit in the pool and in its model, and compare everything that came back."""
    offsets = np.cumsum([0, *map(len, hits)]).astype(np.int32)
    pool, admitted = _admit(
        pool,
        np.array(counts, np.int32),
        capacity=capacity,
        hits=padded(list(chain(*hits)), num_hits),
        hit_offsets=offsets,
        order=None if order is None else np.array(order, np.int32),
    )
    expected = model.admit(counts, hits, range(len(counts)) if order is None else order, capacity)
    same_admission(admitted, expected, capacity)
    return pool


def same_state(pool: BlockPool, model: PoolModel) -> None:
    """Counts, content and free blocks agree; the pool agrees with itself."""
    check_invariants(pool)
    assert pool.ref_counts.tolist() == model.refs
    assert set(np.flatnonzero(pool.cached).tolist()) == model.cached
    assert int(pool.num_free) == model.num_free
    assert int(pool.num_cached_free) == len(model.cached_free)


class PoolMachine(RuleBasedStateMachine):
    """Every operation, right and wrong, in any order."""

    @initialize(num_blocks=st.sampled_from([2, STRATEGY_BLOCKS]))
    def create(self, num_blocks: int) -> None:
        self.pool, self.model = BlockPool.create(num_blocks), PoolModel(num_blocks)

    def block_ids(self, data, wanted, most: int) -> list[int]:
        """Some of the blocks that are ``wanted``; now and then any id, inside the pool or not."""
        candidates = [b for b in range(self.model.num_blocks) if wanted(b)]
        right = st.lists(st.sampled_from(candidates), max_size=most) if candidates else st.just([])
        anything = st.lists(st.integers(-1, self.model.num_blocks), max_size=most)
        return data.draw(st.one_of(right, right, right, anything))

    @rule(data=st.data())
    def admit(self, data) -> None:
        counts = data.draw(_COUNTS)
        hits = [self.block_ids(data, self.model._can_hit, 2) for _ in range(ROWS)]
        order = data.draw(st.one_of(st.none(), st.permutations(range(ROWS))))
        self.pool = admit_both(self.pool, self.model, counts, hits, order, CAPACITY, HITS)

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        self.pool, admitted = _allocate(self.pool, np.array([count], np.int32), capacity=4)
        ids, _, ok = self.model.admit([count], [[]], [0], 4)
        assert admitted.ok.tolist() == ok
        assert admitted.ids.tolist() == padded(ids[0], 4).tolist()

    @rule(data=st.data())
    def share(self, data) -> None:
        ids = self.block_ids(data, self.model._can_hit, 4)
        self.pool, ok = _share(self.pool, padded(ids, BATCH))
        assert ok == self.model.admit([0], [[b for b in ids if b != -1]], [0], BATCH)[2][0]

    @rule(data=st.data())
    def take(self, data) -> None:
        ids = self.block_ids(data, lambda b: True, 4)
        self.pool, ok = _take(self.pool, padded(ids, BATCH))
        assert ok == self.model.take(ids)

    @precondition(lambda self: self.model.num_blocks == STRATEGY_BLOCKS)
    @rule(counts=_COUNTS)
    def allocate_runs(self, counts) -> None:
        self.pool, admitted = _allocate_runs(self.pool, np.array(counts, np.int32))
        same_admission(admitted, self.model.allocate_runs(counts, CAPACITY), CAPACITY)
        free = [b for b in range(self.model.num_blocks) if self.model.refs[b] == 0]
        longest = max((n for n in range(1, len(free) + 1) if self.model._shortest(free, n)), default=0)
        assert longest_free_run(self.pool) == longest

    @precondition(lambda self: self.model.num_blocks == STRATEGY_BLOCKS)
    @rule(counts=_COUNTS, nodes=st.lists(st.integers(-1, NODES), min_size=ROWS, max_size=ROWS))
    def allocate_near(self, counts, nodes) -> None:
        self.pool = near_both(self.pool, self.model, counts, nodes, NODES, CAPACITY)

    @rule(data=st.data())
    def free(self, data) -> None:
        ids = self.block_ids(data, lambda b: self.model.refs[b] > 0, BATCH)
        self.pool, ok = _free(self.pool, padded(ids, BATCH))
        assert ok == self.model.free(ids)

    @precondition(lambda self: any(self.model.refs))
    @rule(data=st.data())
    def free_what_is_held(self, data) -> None:
        held = [b for b, count in enumerate(self.model.refs) for _ in range(count)]
        ids = data.draw(st.permutations(held))[: data.draw(st.integers(1, BATCH))]
        self.pool, ok = _free(self.pool, padded(ids, BATCH))
        assert ok
        assert self.model.free(ids)

    @rule(data=st.data())
    def mark_cached(self, data) -> None:
        ids = self.block_ids(data, lambda b: self.model.refs[b] > 0, BATCH)
        self.pool, ok = _mark_cached(self.pool, padded(ids, BATCH))
        assert ok == self.model.mark_cached(ids)

    @rule(data=st.data())
    def uncache(self, data) -> None:
        ids = self.block_ids(data, lambda b: b in self.model.cached, 3)
        self.pool, ok = _uncache(self.pool, padded(ids, BATCH))
        assert ok == self.model.uncache(ids)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pool"):
            same_state(self.pool, self.model)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_long_queues_are_swept_and_scanned_window_by_window(seed):
    """Queues of several windows: revive, forget and free from the middle until the ring has gone round many times."""
    rng, num_blocks, rows = np.random.default_rng(seed), 400, 4
    pool, model, held = BlockPool.create(num_blocks), PoolModel(num_blocks), []
    for step in range(60):
        free_cached = list(model.cached_free)
        rng.shuffle(free_cached)
        hits = [free_cached[i * 16 : (i + 1) * 16] for i in range(rows)]
        counts = rng.choice([0, 10, 40], size=rows).tolist()
        before = list(model.refs)
        pool = admit_both(pool, model, counts, hits, rng.permutation(rows).tolist(), 256, 64)
        held += [b for b in range(num_blocks) for _ in range(model.refs[b] - before[b])]
        pool, ok = _mark_cached(pool, padded(held[:100], 256))
        assert ok
        assert model.mark_cached(held[:100])
        rng.shuffle(held)
        dropped, held = held[:200], held[200:]
        pool, ok = _free(pool, padded(dropped, 256))
        assert ok
        assert model.free(dropped)
        taken = rng.integers(0, num_blocks, 30).tolist()
        pool, ok = _take(pool, padded(taken, 64))
        assert ok
        assert model.take(taken)
        held += taken
        forgotten = rng.permutation(num_blocks)[: 20 * (step % 3 == 0)].tolist()
        pool, ok = _uncache(pool, padded(forgotten, 64))
        assert ok
        assert model.uncache(forgotten)
        same_state(pool, model)
        near_both(pool, copy.deepcopy(model), counts, rng.integers(0, 4, rows).tolist(), 4, 256)


def test_eviction_in_the_middle_of_a_sweep():
    """Part of the ring compacted, then the gap, then the rest: blocks are taken in order, and across the gap."""
    rng, num_blocks = np.random.default_rng(0), 600
    everything = list(range(num_blocks))
    pool, model = BlockPool.create(num_blocks), PoolModel(num_blocks)
    pool, _ = pool.allocate([num_blocks], capacity=num_blocks)
    model.admit([num_blocks], [[]], [0], num_blocks)
    pool, _ = pool.mark_cached(everything)
    pool, _ = pool.free(everything)
    assert model.mark_cached(everything)
    assert model.free(everything)
    mid_sweep = 0
    for _ in range(8):
        ids = rng.choice(num_blocks, 32, replace=False).tolist()
        pool, _ = pool.share(ids)
        model.admit([0], [ids], [0], len(ids))
        pool, _ = pool.free(ids)
        assert model.free(ids)
        at = Counters.of(pool.counters)
        mid_sweep += bool(at.compacted > 0 and at.gap > 0 and at.unswept > 0)
        emptied, emptied_model = pool, copy.deepcopy(model)
        expected = copy.deepcopy(model)
        same_state(near_both(pool, expected, [275], [1], 2, 275), expected)
        for count in (50, 275, 275):
            emptied, admitted = _allocate(emptied, np.array([count], np.int32), capacity=275)
            expected, _, _ = emptied_model.admit([count], [[]], [0], 275)
            assert admitted.ids[:count].tolist() == expected[0]
            same_state(emptied, emptied_model)
    assert mid_sweep >= 3
