"""What a scheduler can ask ahead of a step, against what the step then does."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup, ManagerOptions, UnknownRequestError
from pyagent_kv_jax.manager import PreemptionCost

BLOCK, ROWS, LONGEST = 4, 6, 40
GROUPS = {
    "one": (),
    "window": (LayerGroup((0,), sliding_window=6), LayerGroup((1,))),
    "chunk": (LayerGroup((0,)), LayerGroup((1,), chunk_size=2 * BLOCK)),
}


def make(groups: str, num_blocks: int = 90) -> KVCacheManager:
    config = KVCacheConfig(
        num_layers=2,
        num_heads=1,
        head_dim=2,
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_reqs=ROWS,
        max_model_len=LONGEST,
        layer_groups=GROUPS[groups],
    )
    return KVCacheManager(config, ManagerOptions(num_host_blocks=60, preemption_cost=PreemptionCost(1e-3, 1e12)))


@pytest.mark.parametrize("groups", ["one", "window"])
def test_a_step_does_what_was_foreseen(groups: str) -> None:
    """Requests that share prefixes come, go, are preempted either way and come back."""
    rng = np.random.default_rng(7)
    manager = make(groups)
    prefixes = [rng.integers(0, 9, size) for size in (3, 11, 24)]
    numbers = itertools.count()
    running: dict[str, int] = {}  # tokens known
    away: dict[str, int] = {}
    seen = {"hits": 0, "swapped": 0, "revived": 0}
    for _ in range(250):
        names = list(running)
        if names and (len(running) == 3 or rng.random() < 0.3):
            name = names[rng.integers(len(names))]
            if rng.random() < 0.5:
                manager.free(name)
            else:
                mode = ("swap", "recompute")[rng.integers(2)]
                manager.record_tokens([name], [5])
                assert manager.preempt(name, mode) == {name: mode}
                away[name] = running[name] + 1
            del running[name]
            continue
        if away and rng.random() < 0.5:
            name = next(iter(away))
        else:
            name = f"r{next(numbers)}"
            prompt = np.concatenate([prefixes[rng.integers(3)], rng.integers(0, 9, rng.integers(1, 9))])
            manager.add_request(name, prompt)
            away[name] = len(prompt)
        known = away.pop(name)
        if known >= LONGEST:
            manager.free(name)
            continue
        # What other rows can no longer see is given back by the next step, whatever it does.
        manager.step([], [], num_rows=ROWS, num_tokens=LONGEST)
        free, before = manager.get_num_free_blocks(), manager.stats()
        preview = manager.preview(name)
        assert manager.stats() == before
        plan = manager.step([name], [known - preview.num_cached_tokens], num_rows=ROWS, num_tokens=LONGEST)
        assert plan.ok.all()
        assert plan.num_cached_tokens[0] == preview.num_cached_tokens
        assert plan.num_tokens[0] == known - preview.num_cached_tokens
        assert free - manager.get_num_free_blocks() == preview.num_blocks
        running[name] = known
        after = manager.stats()
        seen["hits"] += preview.num_cached_tokens > 0
        seen["swapped"] += after.num_swapped_in > before.num_swapped_in
        seen["revived"] += after.num_cached_free_blocks < before.num_cached_free_blocks
    assert all(count > 5 for count in seen.values()), seen


def test_only_for_requests_that_hold_no_blocks() -> None:
    manager = make("one")
    manager.allocate("a", 9)
    for name in ("a", "nobody"):
        with pytest.raises(UnknownRequestError, match="holds no blocks"):
            manager.preview(name)


def test_a_request_too_large_to_come_back_is_not_swapped() -> None:
    """In host memory it takes what its groups still see; on its way in, all its columns in every group."""
    manager = make("window", num_blocks=14)
    manager.add_request("a", np.arange(40) % 9)
    for _ in range(9):
        manager.step(["a"], [4], num_rows=ROWS, num_tokens=LONGEST)
    assert manager.preempt("a") == {"a": "recompute"}
    manager.free("a")
    manager.add_request("b", np.arange(20) % 9)
    manager.step(["b"], [20], num_rows=ROWS, num_tokens=LONGEST)
    assert manager.preempt("b") == {"b": "swap"}
    assert manager.step(["b"], [1], num_rows=ROWS, num_tokens=LONGEST).ok.all()


def test_steps_compile_nothing_after_warm_up() -> None:
    """Nor does warm_up touch what is there."""
    manager = make("one")
    manager.allocate("mine", 30)
    manager.add_request("waiting", np.arange(9))
    before = manager.stats()
    manager.warm_up(ROWS)
    manager.warm_up(ROWS, LONGEST)
    assert manager.stats() == before
    manager.check_invariants()
    compiled: list[str] = []

    def listen(event: str, duration: float, **details: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", str(duration)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for round_number in range(3):
            for name in ("a", "b", "c"):
                manager.add_request(name, np.arange(21) + round_number)
            for name in ("a", "b", "c"):
                manager.preview(name)
                manager.step([name], [21], num_rows=ROWS, num_tokens=LONGEST)
            manager.step(["a", "b"], [1, 1], free=["c"], num_rows=ROWS)
            manager.step(["a"], [5], free=["b"], num_rows=ROWS, num_tokens=LONGEST)
            manager.free("a")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert manager.stats().hit_rate > 0.4


@pytest.mark.parametrize(("groups", "step_tokens"), [("one", 17), ("window", 5), ("window", 17), ("chunk", 5)])
def test_most_blocks_is_what_a_request_alone_comes_to(groups: str, step_tokens: int) -> None:
    manager, held, most = make(groups), 0, 0
    while held < LONGEST:
        count = min(step_tokens, LONGEST - held)
        manager.step(["a"], [count], num_rows=ROWS, num_tokens=LONGEST)
        held += count
        most = max(most, 90 - manager.get_num_free_blocks())
        assert most <= manager.config.most_blocks(held, step_tokens)
    assert most >= manager.config.most_blocks(LONGEST, step_tokens) - 3  # and not much less
    fitting = make(groups, num_blocks=manager.config.most_blocks(LONGEST, step_tokens))
    assert fitting.config.max_request_tokens == LONGEST
    assert make(groups, num_blocks=7).config.max_request_tokens == 7 * BLOCK  # one group keeps all tokens
