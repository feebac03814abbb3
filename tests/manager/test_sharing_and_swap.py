"""The manager's larger features, one at a time; ``test_manager_machine.py`` mixes them."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from pyagent_kv_jax import (
    CacheExtras,
    CallbackError,
    DuplicateRequestError,
    InvalidArgumentError,
    KVCacheConfig,
    KVCacheManager,
    LayerGroup,
    ManagerOptions,
    MemoryPressure,
    MultimodalItem,
    OutOfBlocksError,
    PreemptionCost,
    UnknownRequestError,
)
from pyagent_kv_jax.manager import AllBlocksCleared, BlockRemoved, BlocksSwapped, BlockStored

BLOCK = 4
CONFIG = KVCacheConfig(
    num_layers=2, num_heads=1, head_dim=2, num_blocks=24, block_size=BLOCK, max_num_reqs=4, max_model_len=64
)
PROMPT = np.arange(1, 19)  # four full blocks and two tokens


def make(config: KVCacheConfig = CONFIG, **options: object) -> KVCacheManager:
    return KVCacheManager(config, ManagerOptions(**options))


def prefill(manager: KVCacheManager, name: str, prompt: np.ndarray = PROMPT, **extras: object) -> tuple[int, int]:
    """(tokens computed, tokens cached)."""
    manager.add_request(name, prompt, **extras)
    plan = manager.step([name], [len(prompt)], num_rows=4, num_tokens=64)
    assert plan.ok.all()
    manager.check_invariants()
    return int(plan.num_tokens[0]), int(plan.num_cached_tokens[0])


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    manager = make()
    assert prefill(manager, "a") == (18, 0)
    assert prefill(manager, "b") == (2, 16)
    assert manager.get_block_table("a")[:4] == manager.get_block_table("b")[:4]
    assert manager.stats().hit_rate == 16 / 36


def test_the_last_token_is_always_computed() -> None:
    manager = make()
    assert prefill(manager, "a", PROMPT[:16]) == (16, 0)
    assert prefill(manager, "b", PROMPT[:16]) == (4, 12)


def test_content_outlives_its_request_until_blocks_are_needed() -> None:
    manager = make()
    prefill(manager, "a")
    manager.free("a")
    assert manager.get_num_free_blocks() == 24
    assert prefill(manager, "b") == (2, 16)
    manager.free("b")
    manager.allocate("large", 64)
    manager.allocate("other", 32)  # all 24 blocks: what was cached gave way
    manager.free("large")
    manager.free("other")
    assert prefill(manager, "c") == (18, 0)
    assert manager.stats().num_evicted_blocks == 4


@pytest.mark.parametrize(
    "extras",
    [
        CacheExtras(salt="tenant"),
        CacheExtras(adapter=("lora", "/a")),
        CacheExtras(items=(MultimodalItem("image", 1, 3),)),
    ],
)
def test_other_extras_share_nothing(extras: CacheExtras) -> None:
    manager = make()
    prefill(manager, "a")
    assert prefill(manager, "b", extras=extras) == (18, 0)
    assert prefill(manager, "c", extras=extras) == (2, 16)


def test_callers_that_must_not_read() -> None:
    manager = make()
    prefill(manager, "a")
    assert prefill(manager, "b", read_prefix_cache=False) == (18, 0)
    manager.free("a")
    manager.free("b")
    assert prefill(manager, "c") == (2, 16)


def test_generated_tokens_are_cached_too() -> None:
    manager = make()
    prefill(manager, "a")
    for token in (90, 91, 92):
        manager.record_tokens(["a"], [token])
        manager.step(["a"], [1], num_rows=4)
    assert prefill(manager, "b", np.append(PROMPT, [90, 91, 7])) == (1, 20)


def test_prefix_caching_can_be_off() -> None:
    manager = make(prefix_caching=False)
    prefill(manager, "a")
    assert prefill(manager, "b") == (18, 0)
    assert manager.stats().num_cached_blocks == 0


def test_evicting_one_prefix_and_all() -> None:
    manager = make(event_capacity=99)
    prefill(manager, "a")
    prefill(manager, "b", PROMPT + 50)
    assert manager.evict_prefix(PROMPT[:8]) == 2
    manager.free("a")
    manager.free("b")
    assert prefill(manager, "c") == (18, 0)
    assert prefill(manager, "d", PROMPT + 50) == (2, 16)
    manager.reset_prefix_cache()
    manager.check_invariants()
    kinds = [type(event) for event in manager.events.drain()]
    assert kinds == [BlockStored, BlockStored, BlockRemoved, BlockStored, AllBlocksCleared]


def test_an_event_reader_that_never_reads_is_told_how_much_it_missed() -> None:
    manager = make(event_capacity=2)
    for i in range(5):
        prefill(manager, "a", PROMPT + 20 * i)
        manager.free("a")
    assert len(manager.events) == 2
    assert manager.events.num_dropped == 3


def test_a_fork_copies_only_what_is_written() -> None:
    manager = make()
    prefill(manager, "a")
    manager.fork("a", "b")
    assert manager.get_block_table("a") == manager.get_block_table("b")
    manager.step(["a", "b"], [1, 1], num_rows=4)
    a, b = manager.get_block_table("a"), manager.get_block_table("b")
    assert a[:4] == b[:4]
    assert a[4] != b[4]
    manager.check_invariants()
    with pytest.raises(DuplicateRequestError, match="'b'"):
        manager.fork("a", "b")
    with pytest.raises(UnknownRequestError, match="'nobody'"):
        manager.fork("nobody", "c")


def test_rejected_drafts_give_their_blocks_back() -> None:
    manager = make()
    prefill(manager, "a")
    before = manager.get_num_free_blocks()
    manager.reserve("a", 9)
    assert before - manager.get_num_free_blocks() == 2
    plan = manager.step(["a"], [10], num_rows=4, num_tokens=16)
    assert plan.num_tokens.tolist() == [10]
    with pytest.raises(InvalidArgumentError, match="9 drafts"):
        manager.step(["a"], [1], num_rows=4)
    with pytest.raises(InvalidArgumentError, match="at most 9"):
        manager.commit("a", 10)
    manager.commit("a", 1)
    assert manager.num_tokens("a") == 20
    assert manager.get_num_free_blocks() == before
    manager.check_invariants()


def test_preemption_weighs_its_cost() -> None:
    quick_link = PreemptionCost(prefill_tokens_per_second=1, swap_bytes_per_second=1e12)
    slow_link = PreemptionCost(prefill_tokens_per_second=1e9, swap_bytes_per_second=1)
    for cost, choice in ((quick_link, "swap"), (slow_link, "recompute")):
        manager = make(num_host_blocks=8, preemption_cost=cost, event_capacity=9)
        prefill(manager, "a")
        assert manager.preempt("a") == {"a": choice}
        assert manager.get_num_free_blocks() == 24
        plan = manager.step(["a"], [1], num_rows=4)
        assert plan.num_cached_tokens.tolist() == [18 if choice == "swap" else 16]
        swaps = [event.direction for event in manager.events.drain() if isinstance(event, BlocksSwapped)]
        assert swaps == (["out", "in"] if choice == "swap" else [])


def test_a_full_host_pool_refuses_and_changes_nothing() -> None:
    manager = make(num_host_blocks=7)
    prefill(manager, "a")
    prefill(manager, "b", PROMPT + 50)
    with pytest.raises(OutOfBlocksError, match="10 blocks do not fit into 7"):
        manager.preempt(["a", "b"], "swap")
    assert manager.request_ids() == ["a", "b"]
    cheap = dataclasses.replace(manager.options.preemption_cost, swap_bytes_per_second=1e15)
    manager = make(num_host_blocks=7, preemption_cost=cheap)
    prefill(manager, "a")
    prefill(manager, "b", PROMPT + 50)
    assert manager.preempt(["a", "b"]) == {"a": "swap", "b": "recompute"}
    manager.free("a")  # cancelled while it is swapped out
    manager.free("b")
    assert manager.stats().num_free_host_blocks == 7
    manager.check_invariants()


def test_blocks_left_of_the_window_come_back() -> None:
    groups = (LayerGroup((0,), sliding_window=5), LayerGroup((1,)))
    manager = make(dataclasses.replace(CONFIG, layer_groups=groups))
    prefill(manager, "a", np.arange(40))
    assert manager.get_num_free_blocks() == 4
    manager.step(["a"], [1], num_rows=4)
    assert manager.get_block_table("a", 0)[:9] == [-1] * 9
    assert manager.get_num_free_blocks() == 24 - 11 - 2
    assert prefill(manager, "b", np.arange(24)) == (4, 20)  # found in both groups, though given back in one


def test_zero_on_free_clears_what_another_held() -> None:
    manager = make(zero_on_free=True)
    manager.allocate("a", 20)
    manager.pages = dataclasses.replace(manager.pages, k_pages=manager.pages.k_pages + 7)
    manager.free("a")
    manager.allocate("b", 64)
    blocks = np.array(manager.get_block_table("b"))
    assert not np.asarray(manager.pages.k_pages).reshape(2, 24, -1)[:, blocks].any()


def test_a_threshold_calls_once_each_time_it_is_crossed() -> None:
    manager, seen = make(), []
    manager.on_memory_pressure(seen.append, threshold=0.5)
    manager.allocate("a", 40)
    assert not seen
    manager.allocate("b", 8)
    manager.extend("b", 8)
    assert [type(pressure) for pressure in seen] == [MemoryPressure]
    assert seen[0].frees == {"a": 10, "b": 2}
    manager.free("a")
    manager.extend("b", 1)
    manager.allocate("a", 40)
    assert len(seen) == 2


def test_a_callback_that_blocks_does_not_stop_the_manager() -> None:
    manager, release, calls = make(callback_timeout=0.05), threading.Event(), []

    def blocks(pressure: MemoryPressure) -> None:
        calls.append(pressure)
        release.wait(20)

    manager.on_memory_pressure(blocks)
    began = time.monotonic()
    plan = manager.step(["a", "b"], [64, 60], num_tokens=128)
    assert plan.ok.tolist() == [True, False]
    assert "did not return" in str(plan.callback_errors[0])
    with pytest.raises(CallbackError, match="still busy"):
        manager.allocate("b", 60)
    assert time.monotonic() - began < 15  # far less than it blocks
    assert len(calls) == 1
    release.set()


def test_a_callback_may_call_the_manager_that_waits_for_it() -> None:
    manager = make()
    manager.allocate("old", 64)
    manager.on_memory_pressure(lambda pressure: manager.preempt(list(pressure.frees)[:1], "recompute"))
    assert len(manager.allocate("new", 60)) == 15
    assert manager.request_ids() == ["new"]
