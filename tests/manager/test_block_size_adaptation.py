"""Block sizes that change under live requests, and the choice of one: content, prefixes, errors, and what pays."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from pyagent_kv_jax import (
    ConfigError,
    InvalidArgumentError,
    KVCacheConfig,
    KVCacheManager,
    LayerGroup,
    ManagerOptions,
    OutOfBlocksError,
)
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.manager import AllBlocksCleared, BlockStored
from pyagent_kv_jax.manager.block_size_adaptation import BlockSizeChooser, attention_times
from pyagent_kv_jax.manager.block_size_switch import BlockSizeReport
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher
from pyagent_kv_jax.manager.swap_space import SwapSpace
from tests.cache.dense_reference import DenseReference
from tests.manager.test_manager_machine import (
    BLOCK,
    BLOCKS,
    HOST_BLOCKS,
    LAYOUTS,
    LONG,
    LONGEST,
    ROWS,
    ManagerMachine,
)


class ChangingMachine(ManagerMachine):
    """Every way to change a manager, and its block size besides."""

    page_size = 2

    @rule(size=st.sampled_from([2, 4, 6, 8]))
    def change_block_size(self, size: int) -> None:
        before = self.manager.config
        try:
            self.manager.change_block_size(size)
        except OutOfBlocksError:
            assert self.manager.config == before
            return
        assert self.manager.config.block_size == size
        if size != before.block_size:  # what was reserved has been given back
            for known in self.requests.values():
                known.reserved = None


if LONG:  # each block size has its own programs to be compiled
    TestChangingMachine = ChangingMachine.TestCase
    TestChangingMachine.settings = settings(
        max_examples=300, stateful_step_count=200, deadline=None, suppress_health_check=list(HealthCheck)
    )

CONFIG = KVCacheConfig(
    num_layers=2,
    num_heads=1,
    head_dim=1,
    num_blocks=BLOCKS,
    block_size=BLOCK,
    max_num_reqs=ROWS,
    max_model_len=LONGEST,
    kernel_block_size=2,
)
PROMPT = np.arange(1, 24)


def make(**options: object) -> KVCacheManager:
    """ "first" is in the way, so that no block of "a" stands where a larger one begins."""
    manager = KVCacheManager(CONFIG, ManagerOptions(num_host_blocks=HOST_BLOCKS, **options))
    manager.add_request("first", [9])
    manager.add_request("a", PROMPT)
    step(manager, ["first", "a"], [1, 23])
    return manager


def step(manager: KVCacheManager, ids: list[str], counts: list[int]) -> np.ndarray:
    """Cached tokens of each; padded to what the machine's steps are padded to, so that nothing compiles twice."""
    plan = manager.step(ids, counts, num_rows=ROWS, num_tokens=ROWS * LONGEST)
    assert plan.ok[: len(ids)].all()
    return plan.num_cached_tokens


attend = jax.jit(KVPages.attend, donate_argnums=0)


def test_answers_are_those_of_a_dense_cache_whatever_the_size() -> None:
    """A fork, too: whoever writes first into a block that both share gets a copy, before the change and after it."""
    manager, reference, rng = make(), DenseReference(3), np.random.default_rng(0)
    rows = {"first": 0, "a": 1, "b": 2}
    manager.free("first")

    def compute(ids: list[str], counts: list[int]) -> None:
        q, k, v = rng.normal(size=(3, ROWS * LONGEST, 1, 1)).astype(np.float32)
        plan = manager.step(ids, counts, num_rows=ROWS, num_tokens=ROWS * LONGEST)
        assert plan.ok[: len(ids)].all()
        out, manager.pages = attend(manager.pages, 1, q, k, v, plan.metadata)
        starts = np.cumsum([0, *counts])
        for name, start, end in zip(ids, starts, starts[1:], strict=False):
            want = reference.attend(rows[name], q[start:end], k[start:end], v[start:end])
            np.testing.assert_allclose(out[start:end], want, atol=1e-5)

    manager.free("a")
    manager.allocate("in the way", 3)
    compute(["a"], [21])
    manager.fork("a", "b")
    reference.k[2], reference.v[2] = list(reference.k[1]), list(reference.v[1])
    assert manager.change_block_size(6).num_copied > 0
    assert manager.get_block_table("a") == manager.get_block_table("b")
    compute(["b", "a"], [1, 2])
    assert manager.get_block_table("a")[:3] == manager.get_block_table("b")[:3]
    assert manager.get_block_table("a")[3] != manager.get_block_table("b")[3]
    manager.change_block_size(4)
    compute(["a", "b"], [1, 3])
    manager.check_invariants()


def test_prefixes_of_live_requests_are_found_under_the_new_size() -> None:
    manager = make(event_capacity=99)
    manager.add_request("gone", PROMPT + 50)
    step(manager, ["gone"], [23])
    manager.free("gone")
    manager.add_request("waiting", PROMPT[:20])
    assert manager.lookup_prefix("waiting").num_tokens == 16
    report = manager.change_block_size(6)
    assert report == BlockSizeReport(6, report.num_copied, 0, 2)  # 44 pages make 14 blocks of 3, and 2 are left over
    assert report.num_copied >= 6
    manager.add_request("later", [*PROMPT, 7])
    manager.add_request("gone again", PROMPT + 50)
    found = [manager.lookup_prefix(name).num_tokens for name in ("waiting", "later", "gone again")]
    assert found == [18, 18, 0]
    assert manager.minimum_reusable_length == 7
    assert step(manager, ["later"], [24])[0] == 18
    assert manager.get_block_table("later")[:3] == manager.get_block_table("a")[:3]
    manager.record_tokens("a", [5])
    step(manager, ["a"], [1])
    manager.add_request("last", [*PROMPT, 5, 8])
    assert manager.lookup_prefix("last").num_tokens == 24  # tokens from before the change and from after it
    kinds = [type(event) for event in manager.events.drain()]
    assert kinds.count(AllBlocksCleared) == 1
    assert BlockStored in kinds[kinds.index(AllBlocksCleared) :]
    manager.check_invariants()


def test_what_stood_in_a_block_before_is_cleared() -> None:
    manager = make(zero_on_free=True)
    manager.pages = jax.tree.map(lambda x: x + 7, manager.pages)
    manager.change_block_size(8)
    blocks = manager.get_block_table("a")
    by_slot = np.asarray(manager.pages.k_pages).reshape(2, 88)
    for name, pages in [("first", 2), ("a", 12)]:  # what belongs to their own last blocks is cleared, and no more
        blocks = np.array(manager.get_block_table(name))
        held = by_slot[:, (blocks[:, None] * 8 + np.arange(8)).ravel()]
        assert (held[:, : 2 * pages] == 7).all()
        assert (held[:, 2 * pages :] == 0).all()


def test_what_cannot_be_changed_leaves_everything() -> None:
    manager = make()
    manager.reserve("a", 2)
    step(manager, ["a"], [3])
    state = manager._state.control.state
    with pytest.raises(InvalidArgumentError, match=r"'a': got 2 drafts not committed yet"):
        manager.change_block_size(8)
    with pytest.raises(InvalidArgumentError, match=r"'a': got 2 drafts not committed yet"):
        manager.adapt_block_size()
    manager.commit("a", 2)
    for size, message in [(5, r"got 2, want a divisor of block_size 5"), (90, r"got 90, want at most the 88 tokens")]:
        with pytest.raises(ConfigError, match=message):
            manager.change_block_size(size)
    table = manager.get_block_table("a")
    with pytest.raises(OutOfBlocksError, match=r"takes 2 of 88, want at most the 1 "):
        manager.change_block_size(88)
    assert manager.get_block_table("a") == table
    assert manager.config == CONFIG
    assert manager._state.control.state.table.config == state.table.config
    pages = manager.pages
    manager.change_block_size(2)
    with pytest.raises(InvalidArgumentError, match=r"pages: got those of blocks of 4 tokens, .* want those .* of 2"):
        manager.pages = pages
    manager.check_invariants()


def test_what_was_reserved_comes_back() -> None:
    manager = make()
    manager.reserve("a", 9)
    manager.change_block_size(8)
    assert manager.get_num_free_blocks() == 11 - 1 - 3
    step(manager, ["a"], [2])
    manager.change_block_size(4)  # none of the two was a draft
    assert manager.num_tokens("a") == 25


def test_a_block_of_which_a_window_let_go_in_part_is_not_cached() -> None:
    """At 10 tokens the first block of 4 is gone, which a query at 6, the end of the first block of 6, would see."""
    groups, horizon = LAYOUTS[2]  # as in the machine, so that nothing compiles twice
    manager = KVCacheManager(
        dataclasses.replace(CONFIG, layer_groups=groups),
        ManagerOptions(num_host_blocks=HOST_BLOCKS, prediction_horizon=horizon),
    )
    manager.add_request("a", PROMPT[:10])
    step(manager, ["a"], [10])
    step(manager, ["a"], [0])
    assert manager.get_block_table("a", 0)[0] == -1
    manager.add_request("short", PROMPT[:7])
    manager.add_request("long", [*PROMPT[:10], 5, 5])
    assert manager.lookup_prefix("short").num_tokens == 4
    manager.change_block_size(6)
    assert [manager.lookup_prefix(name).num_tokens for name in ("short", "long")] == [0, 0]
    manager.preempt("a", "swap")
    step(manager, ["a"], [0])
    step(manager, ["a"], [1])
    assert [manager.lookup_prefix(name).num_tokens for name in ("short", "long")] == [0, 0]
    manager.check_invariants()


def test_host_memory_changes_too() -> None:
    manager = make()
    rng = np.random.default_rng(0)
    manager.pages = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), manager.pages)
    want = stored(manager, "a")
    manager.preempt(["first", "a"], "swap")
    manager.reset_prefix_cache()
    manager.pages = jax.tree.map(lambda x: x * 0, manager.pages)
    with pytest.raises(OutOfBlocksError, match=r"takes 2 of 40, want at most the 1 "):
        manager.change_block_size(40)
    assert manager.config == CONFIG
    report = manager.change_block_size(8)
    assert report.num_copied == 0
    assert report.num_copied_on_host > 0
    assert manager.stats().num_host_blocks == 6
    assert manager.stats().num_free_host_blocks == 2
    step(manager, ["a"], [0])
    np.testing.assert_array_equal(stored(manager, "a"), want)


def test_host_memory_is_whole_whatever_the_size_at_the_first_swap() -> None:
    space, hasher = SwapSpace(CONFIG, 12), BlockHasher(4)
    for size, blocks in [(10, 4), (4, 12)]:
        config = CONFIG.with_block_size(size)
        space.change_block_size(config, space.block_size_change(config), hasher)
        assert space.num_blocks == space.num_free == blocks
        space.copy_out(KVPages.create(config), np.array([1]), np.array([blocks - 1]))


def stored(manager: KVCacheManager, name: str) -> np.ndarray:
    """[K or V, layers, tokens] of a request."""
    size, positions = manager.config.block_size, np.arange(manager.num_tokens(name))
    slots = np.array(manager.get_block_table(name))[positions // size] * size + positions % size
    pages = np.stack([np.asarray(x).reshape(2, -1) for x in (manager.pages.k_pages, manager.pages.v_pages)])
    return pages[:, :, slots]


def test_adapting_follows_the_lengths() -> None:
    manager = KVCacheManager(dataclasses.replace(CONFIG, num_heads=64), ManagerOptions())
    times = {2: 1.2, 8: 1.0}
    chooser = BlockSizeChooser(manager.config, relative_times=times, largest=8, half_life=4)
    for name in ("a", "b", "c"):
        manager.allocate(name, 16)
    assert manager.adapt_block_size(chooser) == manager.config.block_size == 8
    for name in ("a", "b", "c"):
        manager.free(name)
    manager.allocate("short", 2)
    for _ in range(20):
        size = manager.adapt_block_size(chooser)
    assert size == manager.config.block_size == chooser.block_size == 2
    assert manager.adapt_block_size() == 2  # the manager's own has seen little, and this
    manager.check_invariants()


# -- the choice


LLAMA = KVCacheConfig(
    num_layers=32, num_heads=8, head_dim=128, num_blocks=4096, block_size=16, kernel_block_size=8, max_model_len=8192
)  # fmt: skip


def plain_costs(config: KVCacheConfig, lengths: list[int], times: dict[int, float], sizes: list[int]) -> dict:
    """In plain Python, for one group of layers and dense tables."""
    per_token, costs = config.kv_size_per_token(), {}
    for size in sizes:
        table = 4 * math.ceil(config.max_model_len / size)
        costs[size] = times[size] * sum(math.ceil(n / size) * size * per_token + table for n in lengths) / len(lengths)
    return costs


@given(lengths=st.lists(st.integers(1, 8192), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_costs_are_bytes_times_seconds(lengths: list[int]) -> None:
    chooser = BlockSizeChooser(LLAMA, half_life=10**9)
    chooser.observe(lengths)
    times = attention_times(LLAMA)
    want = plain_costs(LLAMA, lengths, times, [8, 16, 32, 64, 128])
    costs = chooser.costs()
    assert list(costs) == list(range(8, 129, 8))
    for size, cost in want.items():
        np.testing.assert_allclose(costs[size], cost, rtol=1e-6)
    assert times[32] * 1.0001 > chooser._time(40) > times[64] * 0.9999
    best = chooser.choose()
    assert best == 16 or costs[best] <= 0.98 * costs[16]
    assert costs[best] <= min(costs.values()) / 0.98


@given(multiple=st.integers(1, 100), many=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_lengths_that_fill_large_blocks_choose_large_ones(multiple: int, many: int) -> None:
    chooser = BlockSizeChooser(LLAMA)
    chooser.observe([64 * multiple] * many)
    assert chooser.choose() >= 64


def test_short_requests_choose_small_blocks() -> None:
    chooser = BlockSizeChooser(LLAMA)
    chooser.observe(np.random.default_rng(0).integers(1, 9, 1000))
    assert chooser.choose() == 8


def test_old_lengths_fade() -> None:
    chooser = BlockSizeChooser(LLAMA, half_life=100)
    chooser.observe([6400] * 1000)
    assert chooser.choose() >= 64
    for _ in range(40):
        chooser.observe([5] * 100)
    assert chooser.choose() == 8


def test_a_small_gain_is_no_reason_to_change() -> None:
    times = {8: 1.0, 16: 1.0, 32: 0.99, 64: 1.0}
    options = {"relative_times": times, "largest": 32}
    for least_gain, want in [(0.02, 16), (0.005, 32)]:
        chooser = BlockSizeChooser(LLAMA, least_gain=least_gain, **options)
        assert chooser.costs() == {}
        assert chooser.choose() == 16
        chooser.observe([0, 320, 640])
        assert chooser.choose() == want
    chooser.block_size = 200  # no candidate, but in use
    assert chooser.choose() == 32


def test_windows_and_sparse_tables_count_what_is_held() -> None:
    groups = (LayerGroup((0,), sliding_window=65), LayerGroup((1,)))
    config = KVCacheConfig(2, 1, 16, num_blocks=64, block_size=8, max_model_len=1024, layer_groups=groups)
    chooser = BlockSizeChooser(config, relative_times={8: 1.0}, sparse_entry_bytes=12)
    chooser.observe([1000])
    block = 8 * 2 * 16 * 4
    np.testing.assert_allclose(chooser.costs()[8], (125 + 64 / 8 + 1) * (block + 12))
    np.testing.assert_allclose(chooser.costs()[128], (8 + 64 / 128 + 1) * (16 * block + 12))


@pytest.mark.parametrize(
    "options",
    [
        {"largest": 0},
        {"half_life": 0},
        {"least_gain": 1.0},
        {"relative_times": {}},
        {"relative_times": {8: -1.0}},
        {"relative_times": {0: 1.0}},
    ],
)
def test_choosers_that_cannot_be(options: dict) -> None:
    with pytest.raises(ConfigError):
        BlockSizeChooser(LLAMA, **options)


@pytest.mark.parametrize("lengths", [[-1], [8193], [1.5], [[1], [2]]])
def test_lengths_that_cannot_be(lengths: list) -> None:
    chooser = BlockSizeChooser(LLAMA)
    with pytest.raises(InvalidArgumentError, match="lengths"):
        chooser.observe(lengths)
    assert chooser.costs() == {}
