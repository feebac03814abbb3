"""What the manager copies in the pages, one case at a time: a request holds the same bytes before and after."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, ManagerOptions

BLOCKS = 24
CONFIG = KVCacheConfig(
    num_layers=2, num_heads=1, head_dim=2, num_blocks=BLOCKS, block_size=4, max_num_reqs=4, max_model_len=64
)
PROMPT = np.arange(1, 19)  # four full blocks and two tokens
RANDOM = np.random.default_rng(0)


def make(zero_on_free: bool = False) -> KVCacheManager:
    """ "before" is in the way, so that "a" has blocks of other ids than 0, 1, ..."""
    manager = KVCacheManager(CONFIG, ManagerOptions(num_host_blocks=16, zero_on_free=zero_on_free))
    scramble(manager)
    manager.allocate("before", 12)
    manager.add_request("a", PROMPT)
    manager.step(["a"], [18], num_rows=4, num_tokens=64)
    scramble(manager)
    return manager


def scramble(manager: KVCacheManager) -> None:
    """Other numbers everywhere."""
    shape = manager.pages.k_pages.shape
    k, v = (jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for _ in range(2))
    manager.pages = dataclasses.replace(manager.pages, k_pages=k, v_pages=v)


def held(manager: KVCacheManager, name: str, count: int = 5) -> np.ndarray:
    """K and V of the request's first blocks, over both layers."""
    blocks = np.array(manager.get_block_table(name)[:count])
    pages = [np.asarray(x).reshape(2, BLOCKS, -1)[:, blocks] for x in (manager.pages.k_pages, manager.pages.v_pages)]
    return np.stack(pages).copy()


@pytest.mark.parametrize("zero", [False, True])
def test_a_fork_that_writes_gets_a_copy(zero: bool) -> None:
    manager = make(zero)
    manager.fork("a", "b")
    want = held(manager, "a")
    manager.step(["b"], [1], num_rows=4)
    assert manager.get_block_table("a")[4] != manager.get_block_table("b")[4]
    np.testing.assert_array_equal(held(manager, "a"), want)
    np.testing.assert_array_equal(held(manager, "b"), want)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("cached", [0, 2])
def test_a_swapped_request_comes_back_as_it_was(zero: bool, cached: int) -> None:
    manager = make(zero)
    want = held(manager, "a")
    manager.preempt("a", "swap")
    manager.reset_prefix_cache()
    if cached:  # its first blocks are found, computed by another
        manager.add_request("same", PROMPT[:8])
        manager.step(["same"], [8], num_rows=4, num_tokens=64)
    scramble(manager)
    manager.step(["a"], [1], num_rows=4)
    np.testing.assert_array_equal(held(manager, "a")[:, :, cached:], want[:, :, cached:])
    if cached:
        assert manager.get_block_table("a")[:2] == manager.get_block_table("same")


def test_blocks_that_stand_in_runs_are_left_alone() -> None:
    manager = make()
    manager.free("before")
    for name in ("x", "a", "y", "a", "x", "a"):  # one block each, in turns
        manager.step([name], [4], num_rows=4, num_tokens=64)
    left = manager.defragment(runs=True, below=0.1)
    assert left.num_moved == 0
    assert 0.1 < left.run_share < 0.9
    moved = manager.defragment(runs=True, below=0.9)
    assert (moved.num_moved > 0, moved.run_share) == (True, left.run_share)
    assert np.all(np.diff(manager.get_block_table("a")) == 1)
    assert manager.defragment(runs=True, below=0.9).num_moved == 0


@pytest.mark.parametrize("runs", [False, True])
def test_a_block_that_moves_takes_its_bytes_along(runs: bool) -> None:
    manager = make()
    manager.free("before")
    before, want = manager.get_block_table("a"), held(manager, "a")
    assert manager.defragment(runs=runs).num_moved
    assert sorted(manager.get_block_table("a")) == [0, 1, 2, 3, 4] != sorted(before)
    np.testing.assert_array_equal(held(manager, "a"), want)
    manager.add_request("b", PROMPT)  # the keys moved too
    manager.step(["b"], [18], num_rows=4, num_tokens=64)
    assert manager.get_block_table("b")[:4] == manager.get_block_table("a")[:4]
