"""The pool's contract case by case, its errors, and what it costs."""

from __future__ import annotations

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

from pyagent_kv_jax.errors import (
    ConfigError,
    DoubleFreeError,
    InvalidArgumentError,
    InvalidBlockError,
    ShapeMismatchError,
)
from pyagent_kv_jax.pool import BlockPool, check_invariants
from pyagent_kv_jax.pool.queues import Counters
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU


def snapshot(pool: BlockPool) -> BlockPool:
    return jax.tree.map(lambda x: np.array(x, copy=True), pool)


@pytest.fixture
def pool() -> BlockPool:
    """Ten blocks: 0 and 1 in use (1 twice), 2 to 4 free with content (freed 4, 3, 2), the others free without."""
    pool, _ = BlockPool.create(10).allocate([5], capacity=8)
    pool, _ = pool.share([1])
    pool, _ = pool.mark_cached([2, 3, 4])
    pool, _ = pool.free([4, 3, 2])
    return pool


def test_blocks_go_out_in_the_order_served(pool):
    pool, admitted = pool.admit([1, 2, 0, 1], capacity=8, order=[3, 1, 2, 0])
    assert admitted.row_offsets.tolist() == [0, 1, 3, 3, 4]
    assert admitted.ids.tolist() == [8, 6, 7, 5, -1, -1, -1, -1]
    assert admitted.ok.tolist() == [True] * 4


def test_the_first_row_that_does_not_fit_stops_the_later_ones(pool):
    """8 are free. Row 1 wants too many; row 2 would fit but comes later; row 3 wants nothing."""
    after, admitted = pool.admit([3, 6, 1, 0], capacity=20)
    assert admitted.ok.tolist() == [True, False, False, True]
    assert admitted.ids.tolist()[:4] == [5, 6, 7, -1]
    assert int(after.num_free) == 5


def test_a_revival_costs_its_first_row_only(pool):
    """8 are free. Both rows hit block 3: row 0 pays for it, so 7 new blocks in all is what fits."""
    hits = {"hits": [3, 3], "hit_offsets": [0, 1, 2], "capacity": 20}
    assert pool.admit([3, 4], **hits)[1].ok.tolist() == [True, True]
    assert pool.admit([3, 5], **hits)[1].ok.tolist() == [True, False]
    assert pool.admit([5, 3], **hits, order=[1, 0])[1].ok.tolist() == [False, True]


def test_no_hit_is_evicted_for_another_row(pool):
    """Row 0 takes all that is free but the block that row 1, served later, has hit."""
    after, admitted = pool.admit([7, 0], capacity=20, hits=[4], hit_offsets=[0, 0, 1])
    assert admitted.ok.tolist() == [True, True]
    assert admitted.ids.tolist()[:8] == [5, 6, 7, 8, 9, 3, 2, 4]  # 4 was freed first, and yet is not taken
    assert admitted.evicted.tolist()[:8] == [False] * 5 + [True, True, False]
    assert np.flatnonzero(after.cached).tolist() == [4]


def test_a_row_that_cannot_be_is_refused_by_itself(pool):
    """Row 0: a negative count. Row 1: hits a free block with no content. Row 2: an id outside. Row 3 is served."""
    _, admitted = pool.admit([-1, 1, 1, 1], capacity=8, hits=[9, 10, 0], hit_offsets=[0, 0, 1, 2, 3])
    assert admitted.ok.tolist() == [False, False, False, True]
    assert admitted.ids.tolist() == [0, 5] + [-1] * 6


def test_capacity_limits_as_free_blocks_do(pool):
    _, admitted = pool.admit([2, 2, 1], capacity=4, hits=[0], hit_offsets=[0, 1, 1, 1])
    assert admitted.ok.tolist() == [True, False, False]
    assert admitted.ids.tolist() == [0, 5, 6, -1]


@pytest.mark.parametrize("order", [[0, 0], [0, 5], [-1, 0]])
def test_an_order_that_is_none_serves_nobody(pool, order):
    before = snapshot(pool)
    after, admitted = pool.admit([1, 1], capacity=4, order=order)
    assert admitted.ok.tolist() == [False, False]
    chex.assert_trees_all_equal(snapshot(after), before)


def test_offsets_that_are_none_serve_nobody(pool):
    before = snapshot(pool)
    for offsets in ([1, 1, 1], [0, 2, 1], [0, 1, 9]):
        after, admitted = pool.admit([1, 1], capacity=4, hits=[0, 1, 2], hit_offsets=offsets)
        assert admitted.ok.tolist() == [False, False]
        chex.assert_trees_all_equal(snapshot(after), before)


def test_a_block_freed_twice_in_a_batch_is_queued_at_its_last_place(pool):
    pool, ok = pool.free([1, 0, 1])
    assert ok
    _, admitted = pool.allocate([7], capacity=7)
    assert admitted.ids.tolist() == [5, 6, 7, 8, 9, 0, 1]


def test_these_very_blocks_are_taken(pool):
    """One in use, one free with content, one without, named twice: the others keep their order."""
    pool, ok = pool.take([1, -1, 7, 3, 7])
    assert ok
    assert pool.ref_counts.tolist() == [1, 3, 0, 1, 0, 0, 0, 2, 0, 0]
    assert np.flatnonzero(pool.cached).tolist() == [2, 3, 4]
    _, admitted = pool.allocate([6], capacity=6)
    assert admitted.ids.tolist() == [
        5,
        6,
        8,
        9,
        4,
        2,
    ]
    assert admitted.evicted.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("method", "ids", "error", "received"),
    [
        ("free", [0, 5], DoubleFreeError, "[0, 5]"),
        ("free", [0, 1, 1, 1], DoubleFreeError, "[0, 1, 1, 1]"),
        ("free", [0, 10], DoubleFreeError, "[0, 10]"),
        ("free", [0, -2], DoubleFreeError, "[0, -2]"),
        ("share", [0, 9], InvalidBlockError, "[0, 9]"),
        ("share", [3, 10], InvalidBlockError, "[3, 10]"),
        ("take", [7, 10], InvalidBlockError, "[7, 10]"),
        ("take", [3, -2], InvalidBlockError, "[3, -2]"),
        ("mark_cached", [0, 3], InvalidBlockError, "[0, 3]"),
        ("mark_cached", [0, -7], InvalidBlockError, "[0, -7]"),
        ("uncache", [3, 10], InvalidBlockError, "[3, 10]"),
    ],
)
def test_a_refused_call_raises_or_says_so_and_changes_nothing(pool, method, ids, error, received):
    before = snapshot(pool)
    with pytest.raises(error) as raised:
        getattr(pool, method)(ids)
    assert received in str(raised.value)
    assert "want" in str(raised.value)
    chex.assert_trees_all_equal(snapshot(pool), before)
    after, ok = jax.jit(lambda pool, ids: getattr(pool, method)(ids))(pool, jnp.array(ids))
    assert not ok
    check_invariants(after)
    chex.assert_trees_all_equal(snapshot(after), before)


def test_arguments_of_the_wrong_kind(pool):
    before = snapshot(pool)
    for call, error in [
        (lambda: pool.free([0.5]), ShapeMismatchError),
        (lambda: pool.free([[0]]), ShapeMismatchError),
        (lambda: pool.free([2**31]), InvalidArgumentError),
        (lambda: pool.admit([1], capacity=-1), InvalidArgumentError),
        (lambda: pool.admit([1], capacity=2**31), InvalidArgumentError),
        (lambda: pool.admit([1], capacity=1, hits=[0]), ShapeMismatchError),
        (lambda: pool.admit([1], capacity=1, hits=[0], hit_offsets=[0]), ShapeMismatchError),
        (lambda: pool.admit([1], capacity=1, order=[0, 1]), ShapeMismatchError),
        (lambda: BlockPool.create(0), ConfigError),
        (lambda: BlockPool.create(2**28), ConfigError),
        (lambda: BlockPool.create(1.5), ConfigError),
    ]:
        with pytest.raises(error, match="want"):
            call()
    chex.assert_trees_all_equal(snapshot(pool), before)


def test_empty_batches_change_nothing(pool):
    before = snapshot(pool)
    for method in ("free", "share", "take", "mark_cached", "uncache"):
        after, ok = getattr(pool, method)([])
        assert ok
        chex.assert_trees_all_equal(snapshot(after), before)
    after, admitted = pool.admit([0, 0], capacity=0, hits=[], hit_offsets=[0, 0, 0])
    assert admitted.ok.tolist() == [True, True]
    assert admitted.ids.shape == (0,)
    chex.assert_trees_all_equal(snapshot(after), before)


def test_methods_never_invalidate_the_pool_they_are_called_on(pool):
    before = snapshot(pool)
    pool.admit([2], capacity=2)
    pool.free([0])
    chex.assert_trees_all_equal(snapshot(pool), before)


BROKEN = {
    "negative": lambda p: {"ref_counts": p.ref_counts.at[0].set(-1)},
    "queued exactly once": lambda p: {"ref_counts": p.ref_counts.at[0].set(0)},
    "in use is queued": lambda p: {"ref_counts": p.ref_counts.at[7].set(1)},
    "the other kind": lambda p: {"cached": p.cached.at[7].set(True)},
    "not where it stands": lambda p: {"position": p.position.at[7].set(8)},
    "not all blocks": lambda p: {"counters": p.counters.at[1].add(-1)},
    "outside the queue": lambda p: {"position": p.position.at[0].set(40)},
    "free cached blocks is wrong": lambda p: {"counters": p.counters.at[6].add(1)},
    "no block": lambda p: {"queue": p.queue.at[7].set(10)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_invariants_names_what_is_broken(pool, what):
    check_invariants(pool)
    broken = dataclasses.replace(pool, **BROKEN[what](pool))
    with pytest.raises(InvalidBlockError, match=what):
        check_invariants(broken)


def test_check_invariants_under_checkify(pool):
    checked = checkify.checkify(jax.jit(check_invariants))
    checked(pool)[0].throw()
    error, _ = checked(dataclasses.replace(pool, ref_counts=pool.ref_counts.at[0].set(-1)))
    with pytest.raises(checkify.JaxRuntimeError, match="negative"):
        error.throw()


# -- inside a user's jit and scan


def _busy_step(pool: BlockPool, hits: jax.Array, counts: jax.Array) -> tuple[BlockPool, jax.Array]:
    """Every operation once, each reading what the one before wrote."""
    pool, shared = pool.share(hits)
    pool, first = pool.allocate(counts, capacity=256)
    pool, marked = pool.mark_cached(first.ids)
    pool, freed = pool.free(jnp.concatenate([hits, first.ids]))
    pool, forgotten = pool.uncache(first.ids[::2])
    offsets = jnp.arange(counts.shape[0] + 1, dtype=jnp.int32)
    pool, second = pool.admit(counts, capacity=512, hits=hits, hit_offsets=offsets, order=offsets[:-1][::-1])
    pool, again = pool.free(second.ids)
    return pool, shared & marked & freed & forgotten & again & first.ok.all() & second.ok.all()


def _busy_steps(pool, hits, counts):
    return lax.scan(lambda pool, _: _busy_step(pool, hits, counts), pool, None, length=3)


_OPERATIONS = {
    "admit with hits": lambda p, ids, counts: p.admit(
        counts, capacity=512, hits=ids, hit_offsets=jnp.arange(257, dtype=jnp.int32)
    ),
    "admit in order": lambda p, ids, counts: p.admit(counts, capacity=256, order=jnp.argsort(ids).astype(jnp.int32)),
    "share": lambda p, ids, counts: p.share(ids),
    "free": lambda p, ids, counts: p.free(ids),
    "mark_cached": lambda p, ids, counts: p.mark_cached(ids),
    "uncache": lambda p, ids, counts: p.uncache(ids),
    "all, one after another": _busy_step,
    "all, in a scan": _busy_steps,
}


@pytest.mark.parametrize("name", _OPERATIONS)
def test_a_million_blocks_are_updated_in_place(name):
    pool = jax.eval_shape(partial(BlockPool.create, 1_000_000))
    batch = jax.ShapeDtypeStruct((256,), jnp.int32)
    memory = jax.jit(_OPERATIONS[name], donate_argnums=0).lower(pool, batch, batch).compile().memory_analysis()
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
    assert memory.temp_size_in_bytes < 100_000
    assert memory.alias_size_in_bytes >= pool_bytes


def test_under_jit_and_scan_as_eagerly():
    pool, held = BlockPool.create(2000).allocate([512], capacity=512)
    hits, counts = held.ids[:256], jnp.ones(256, jnp.int32)
    eager, oks = pool, []
    for _ in range(3):
        eager, ok = _busy_step(eager, hits, counts)
        oks.append(bool(ok))
    traced = jax.jit(chex.assert_max_traces(_busy_steps, n=1), compiler_options=CONTROL_STEP_ON_CPU)
    scanned, scanned_oks = traced(pool, hits, counts)
    assert oks == scanned_oks.tolist() == [True] * 3
    chex.assert_trees_all_equal(scanned, eager)
    check_invariants(scanned)
    traced(scanned, hits, counts)


@pytest.mark.parametrize("method", ["share", "take"])
def test_the_ring_of_cached_blocks_stays_within_twice_the_pool(method):
    """Revived and freed for ever, with never an eviction to shorten the ring."""
    num_blocks, rng = 600, np.random.default_rng(0)
    pool, held = BlockPool.create(num_blocks).allocate([num_blocks], capacity=num_blocks)
    pool, _ = pool.mark_cached(held.ids)
    pool, _ = pool.free(held.ids)
    step = jax.jit(lambda pool, ids: getattr(pool, method)(ids)[0].free(ids)[0], compiler_options=CONTROL_STEP_ON_CPU)
    longest = 0
    for _ in range(200):
        pool = step(pool, rng.choice(num_blocks, 64, replace=False).astype(np.int32))
        longest = max(longest, int(Counters.of(pool.counters).cached_extent))
    check_invariants(pool)
    assert num_blocks + 64 < longest <= 2 * num_blocks  # holes there were, and they were swept
