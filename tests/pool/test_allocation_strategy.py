"""The allocation strategies: what tells them apart, what they refuse, and what they say then."""

from __future__ import annotations

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, OutOfBlocksError, ShapeMismatchError
from pyagent_kv_jax.pool import (
    BlockPool,
    allocate_blocks,
    check_invariants,
    longest_free_run,
    node_of_block,
    require_allocated,
)
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU

CONTIGUOUS, SCATTERED = BlockAllocationStrategy.CONTIGUOUS, BlockAllocationStrategy.SCATTERED
NUMA_AWARE, PREDICTIVE = BlockAllocationStrategy.NUMA_AWARE, BlockAllocationStrategy.PREDICTIVE
ROWS, CAPACITY = 4, 8


@pytest.fixture(scope="module")
def pool() -> BlockPool:
    """Twelve blocks, free but for 4 and 8; 6 and 7 with content. The pool's own order: 9 11 3 10 5 2 1 0, 7 6."""
    pool, _ = BlockPool.create(12).take(list(range(12)))
    pool, _ = pool.mark_cached([6, 7])
    return pool.free([9, 11, 3, 7, 10, 5, 2, 6, 1, 0])[0]


def ids_of(pool: BlockPool, counts, **how) -> list[int]:
    if np.ndim(how.get("node", 0)):
        how["node"] = how["node"] + [0] * (ROWS - len(counts))
    counts = counts + [0] * (ROWS - len(counts))  # one shape, compiled once
    after, admitted = allocate_blocks(pool, counts, capacity=CAPACITY, **how)
    check_invariants(after)
    require_allocated(after, counts, admitted, how.get("strategy", SCATTERED))
    ids = admitted.ids[: sum(counts)].tolist()
    assert np.asarray(after.ref_counts)[ids].tolist() == [1] * len(ids)
    assert np.flatnonzero(np.asarray(after.ref_counts) != np.asarray(pool.ref_counts)).tolist() == sorted(ids)
    assert np.flatnonzero(after.cached).tolist() == [b for b in (6, 7) if b not in ids]
    assert admitted.evicted.tolist() == [b in (6, 7) for b in ids] + [False] * (CAPACITY - len(ids))
    return ids


def test_the_strategies_are_told_apart_by_the_blocks_they_give(pool) -> None:
    assert ids_of(pool, [3]) == ids_of(pool, [3], strategy=SCATTERED) == [9, 11, 3]
    assert ids_of(pool, [3], strategy=CONTIGUOUS) == [9, 10, 11]
    assert ids_of(pool, [3], strategy=NUMA_AWARE, node=0, num_nodes=3) == [3, 2, 1]
    with pytest.raises(InvalidArgumentError, match="PredictiveBlockAllocator"):
        ids_of(pool, [3], strategy=PREDICTIVE)


def test_each_row_gets_the_shortest_run_that_is_long_enough(pool) -> None:
    """Runs without content: 0-3, 5, 9-11. Together with 6 and 7: 0-3, 5-7, 9-11."""
    assert ids_of(pool, [1, 0, 2, 1], strategy=CONTIGUOUS) == [5, 9, 10, 11]
    assert ids_of(pool, [3, 3], strategy=CONTIGUOUS) == [9, 10, 11, 0, 1, 2]
    assert ids_of(pool, [3, 4, 1], strategy=CONTIGUOUS) == [9, 10, 11, 0, 1, 2, 3, 5]
    assert ids_of(pool, [4, 3], strategy=CONTIGUOUS)[4:] == [9, 10, 11]
    taken, _ = pool.take([2, 10])
    assert [int(longest_free_run(pool)), int(longest_free_run(taken))] == [4, 3]
    assert ids_of_any(taken, [3]) == [5, 6, 7]  # only with the content given up


def ids_of_any(pool: BlockPool, counts) -> list[int]:
    counts = counts + [0] * (ROWS - len(counts))
    after, admitted = allocate_blocks(pool, counts, capacity=CAPACITY, strategy=CONTIGUOUS)
    assert admitted.evicted.tolist()[:3] == [False, True, True]
    assert not np.any(after.cached)
    return admitted.ids[: sum(counts)].tolist()


def test_a_node_is_emptied_before_the_others_give_theirs(pool) -> None:
    """Node 1 of 3 has 5 and, with content, 7 and 6."""
    near = {"strategy": NUMA_AWARE, "num_nodes": 3}
    assert ids_of(pool, [5], node=1, **near) == [5, 7, 6, 9, 11]
    assert ids_of(pool, [4, 2], node=[1, 2], **near) == [5, 7, 6, 3, 9, 11]  # row 1's own blocks are not row 0's
    assert ids_of(pool, [1, 2, 1], node=1, **near) == [5, 7, 6, 9]
    assert node_of_block([0, 3, 4, 11, 12, -1], 12, 3).tolist() == [0, 0, 1, 2, -1, -1]
    with pytest.raises(InvalidArgumentError, match=f"ids: got {2**32}"):
        node_of_block(np.array([2**32]), 12, 3)


def test_after_fragmentation_the_run_is_found_or_the_figures_are_said() -> None:
    rng = np.random.default_rng(0)
    found = missed = 0
    for _ in range(20):
        held = rng.permutation(64)[: rng.integers(4, 40)].astype(np.int32)
        pool, _ = BlockPool.create(64).take(np.pad(held, (0, 40 - len(held)), constant_values=-1))
        free = "".join("x" if block in held else "." for block in range(64))
        longest, count = max(map(len, free.split("x"))), int(rng.integers(1, 9))
        assert int(longest_free_run(pool)) == longest
        after, admitted = allocate_blocks(pool, [count], capacity=CAPACITY, strategy=CONTIGUOUS)
        if count <= longest:
            found += 1
            first = int(admitted.ids[0])
            assert admitted.ids[:count].tolist() == list(range(first, first + count))
            assert "x" not in free[first : first + count]
            continue
        missed += 1
        chex.assert_trees_all_equal(after, pool)
        with pytest.raises(OutOfBlocksError) as raised:
            require_allocated(after, [count], admitted, CONTIGUOUS)
        for figure in (f"request for {count} ", f"{free.count('.')} free", f"at most {longest},"):
            assert figure in str(raised.value)
    assert found > 2
    assert missed > 2


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"strategy": "numa"}, InvalidArgumentError, "got 'numa', want one of"),
        ({"strategy": NUMA_AWARE, "num_nodes": 3}, InvalidArgumentError, "want one with 'numa_aware' only"),
        ({"strategy": CONTIGUOUS, "node": 0}, InvalidArgumentError, "got 0 with 'contiguous'"),
        ({"strategy": NUMA_AWARE, "node": 3, "num_nodes": 3}, InvalidArgumentError, "got [3], want 0 to 2"),
        ({"strategy": NUMA_AWARE, "node": -1, "num_nodes": 3}, InvalidArgumentError, "got [-1], want 0 to 2"),
        ({"strategy": NUMA_AWARE, "node": [0, 1], "num_nodes": 3}, ShapeMismatchError, "want int32[1]"),
        ({"strategy": NUMA_AWARE, "node": 0.5, "num_nodes": 3}, ShapeMismatchError, "want int32[1]"),
        (
            {"strategy": NUMA_AWARE, "node": 0, "num_nodes": 5},
            ConfigError,
            "got 5, want a positive integer that divides",
        ),
        ({"strategy": NUMA_AWARE, "node": 0, "num_nodes": 0}, ConfigError, "got 0"),
        ({"strategy": CONTIGUOUS, "capacity": -1}, InvalidArgumentError, "capacity: got -1"),
    ],
)
def test_what_cannot_be_served_is_refused(pool, how, error, message) -> None:
    with pytest.raises(error) as raised:
        allocate_blocks(pool, [1], **{"capacity": CAPACITY, **how})
    assert message in str(raised.value)


def test_traced_a_refused_row_changes_nothing(pool) -> None:
    """Row 0 does not fit; row 1 would, but comes later; row 2 wants nothing; row 3 is wrong by itself."""
    counts = jnp.array([11, 1, 0, -1], jnp.int32)
    near = {"strategy": NUMA_AWARE, "num_nodes": 3}
    for how, node in (({"strategy": CONTIGUOUS}, {}), (near, {"node": jnp.array([0, 1, 2, 7])})):
        after, admitted = jax.jit(partial(allocate_blocks, capacity=20, **how), compiler_options=CONTROL_STEP_ON_CPU)(
            pool, counts, **node
        )
        assert admitted.ok.tolist() == [False, False, True, False]
        assert admitted.ids.tolist() == [-1] * 20
        chex.assert_trees_all_equal(after, pool)
        with pytest.raises(OutOfBlocksError, match=r"row 0: got a request for 11 .*10 free"):
            require_allocated(after, counts, admitted, how["strategy"])
    with pytest.raises(InvalidArgumentError, match="row 1: got a request for -1 blocks"):
        require_allocated(pool, [1, -1], dataclasses.replace(admitted, ok=np.array([True, False])))


def test_no_rows_and_no_room(pool) -> None:
    for how in ({"strategy": CONTIGUOUS}, {"strategy": NUMA_AWARE, "num_nodes": 3, "node": 0}):
        assert allocate_blocks(pool, [], capacity=4, **how)[1].ok.shape == (0,)
        without_room = partial(allocate_blocks, capacity=0, **how)
        after, admitted = jax.jit(without_room, compiler_options=CONTROL_STEP_ON_CPU)(pool, jnp.array([0, 1]))
        assert admitted.ok.tolist() == [True, False]
        chex.assert_trees_all_equal(after, pool)
