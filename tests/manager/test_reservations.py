"""Blocks reserved for drafts, when something else happens to their request before its step; forks and evictions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup, ManagerOptions

CONFIG = KVCacheConfig(
    num_layers=1, num_heads=1, head_dim=2, num_blocks=24, block_size=4, max_num_reqs=4, max_model_len=64
)
PROMPT = np.arange(1, 19)  # four full blocks and two tokens


def with_reservation(drafts: int = 9) -> KVCacheManager:
    manager = KVCacheManager(CONFIG, ManagerOptions(num_host_blocks=16))
    assert manager.pages is not None
    manager.add_request("a", PROMPT)
    manager.step(["a"], [18], num_rows=4, num_tokens=64)
    manager.reserve("a", drafts)
    return manager


def slots_of(manager: KVCacheManager, name: str, count: int) -> list[int]:
    return manager.step([name], [count], num_rows=4, num_tokens=16).metadata.slot_mapping[:count].tolist()


@pytest.mark.parametrize("drafts", [0, 2, 9])
def test_a_fork_takes_no_reserved_block(drafts: int) -> None:
    manager = with_reservation(drafts)
    manager.fork("a", "b")
    assert len(manager.get_block_table("a")) == len(manager.get_block_table("b")) == 5
    assert not set(slots_of(manager, "b", 3)) & set(slots_of(manager, "a", 3))
    manager.check_invariants()
    manager.free("a")
    manager.free("b")
    assert manager.get_num_free_blocks() == 24


def test_a_swap_moves_no_reserved_block() -> None:
    manager = with_reservation()
    manager.pages = type(manager.pages)(
        jnp.arange(manager.pages.k_pages.size, dtype=jnp.float32).reshape(manager.pages.k_pages.shape),
        manager.pages.v_pages,
        None,
        None,
        CONFIG,
    )
    before = np.asarray(manager.pages.k_pages)[manager.get_block_table("a")[:5]].copy()
    manager.preempt("a", "swap")
    assert manager.stats().num_free_host_blocks == 16 - 5
    manager.allocate("other", 24)  # so that it comes back to other blocks
    slots_of(manager, "a", 1)
    after = np.asarray(manager.pages.k_pages)[manager.get_block_table("a")[:5]]
    np.testing.assert_array_equal(after, before)
    manager.check_invariants()


def test_what_was_reserved_counts_no_longer_after_a_preemption() -> None:
    manager = with_reservation()
    manager.preempt("a", "recompute")
    assert manager.get_num_free_blocks() == 24
    slots_of(manager, "a", 2)
    slots_of(manager, "a", 1)  # no drafts to be committed


def test_drafts_in_the_middle_of_a_prompt_are_not_cached() -> None:
    """The keys of the whole prompt are known; what is computed is what was guessed."""
    manager = KVCacheManager(CONFIG)
    manager.add_request("a", PROMPT)
    manager.step(["a"], [4], num_rows=4, num_tokens=64)
    manager.reserve("a", 7)
    manager.step(["a"], [8], num_rows=4, num_tokens=64)
    assert manager.stats().num_cached_blocks == 1
    manager.commit("a", 0)
    manager.add_request("b", PROMPT)
    assert manager.lookup_prefix("b").num_tokens == 4


def test_what_the_window_sees_without_the_drafts_stays() -> None:
    groups = (LayerGroup((0,), sliding_window=5), LayerGroup((1,)))
    manager = KVCacheManager(dataclasses.replace(CONFIG, num_layers=2, layer_groups=groups))
    manager.allocate("a", 9)
    manager.reserve("a", 7)
    manager.step(["a"], [8], num_rows=4, num_tokens=16)
    manager.step(["b"], [1], num_rows=4)  # in which blocks out of sight are given back
    manager.commit("a", 0)
    assert [block >= 0 for block in manager.get_block_table("a")] == [False, True, True]  # token 10 sees 6 to 10
    manager.check_invariants()


def test_a_fork_has_keys_of_its_own() -> None:
    manager = with_reservation(0)
    manager.fork("a", "b")
    for token in (50, 51):
        manager.record_tokens(["a", "b"], [token, token + 10])
        manager.step(["a", "b"], [1, 1], num_rows=4)
    for name, added in (("a", [50, 51, 1]), ("b", [60, 61, 1])):
        manager.add_request("c", np.append(PROMPT, added))
        assert manager.lookup_prefix("c").blocks[0, 4] == manager.get_block_table(name)[4]
        manager.free("c")


def test_an_evicted_prefix_is_free_like_any_other() -> None:
    manager = with_reservation(0)
    manager.free("a")
    assert manager.stats().num_cached_free_blocks == 4
    manager.evict_prefix(PROMPT[:8])
    assert manager.stats().num_cached_free_blocks == 2
