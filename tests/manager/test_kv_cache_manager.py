"""``KVCacheManager``: single requests, errors that change nothing, callbacks, threads."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest

from pyagent_kv_jax import (
    CallbackError,
    DeviceType,
    DType,
    DuplicateRequestError,
    InvalidArgumentError,
    KVCacheConfig,
    KVCacheManager,
    MemoryPressure,
    OutOfBlocksError,
    RequestTooLongError,
    TooManyRequestsError,
    UnknownRequestError,
    create_kv_cache_manager,
)

BLOCK = 4


def make_manager(num_blocks: int = 12, max_num_reqs: int = 4, max_model_len: int = 32) -> KVCacheManager:
    return KVCacheManager(
        KVCacheConfig(
            num_layers=2,
            num_heads=2,
            head_dim=8,
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_num_reqs=max_num_reqs,
            max_model_len=max_model_len,
        )
    )


def snapshot(manager: KVCacheManager) -> dict[str, object]:
    return {
        "arrays": [np.array(leaf) for leaf in jax.tree.leaves(manager._state.control.state)],
        "rows": dict(manager._state.rows._rows),
        "unused": list(manager._state.rows._unused),
    }


def assert_unchanged(before: dict[str, object], manager: KVCacheManager) -> None:
    after = snapshot(manager)
    assert before["rows"] == after["rows"]
    assert before["unused"] == after["unused"]
    for old, new in zip(before["arrays"], after["arrays"], strict=True):
        np.testing.assert_array_equal(old, new)


def test_allocate_extend_free_round_trip() -> None:
    manager = make_manager()
    blocks = manager.allocate("a", 5)
    assert len(blocks) == 2
    assert manager.get_block_table("a") == blocks
    assert manager.get_block_table("a", layer_idx=1) == blocks
    assert manager.num_tokens("a") == 5
    assert manager.extend("a", 3) == blocks  # fills the second block
    longer = manager.extend("a", 1)
    assert longer[:2] == blocks
    assert len(set(longer)) == 3
    assert manager.get_num_free_blocks() == 9
    assert manager.usage() == pytest.approx(3 / 12)
    manager.check_invariants()
    manager.free("a")
    assert manager.get_num_free_blocks() == 12
    assert manager.request_ids() == []
    manager.check_invariants()


def test_blocks_of_different_requests_are_distinct() -> None:
    manager = make_manager()
    tables = [manager.allocate(name, 9) for name in "abc"]
    assert len({block for table in tables for block in table}) == 9
    manager.free("b")
    manager.check_invariants()
    assert len(set(manager.allocate("d", 16)) & set(tables[0] + tables[2])) == 0
    manager.check_invariants()


def test_create_kv_cache_manager_takes_the_seeds_arguments() -> None:
    manager = create_kv_cache_manager(2, 4, 16, 8, 16, dtype=DType.FLOAT32, device=DeviceType.CPU)
    assert manager.config.block_size_bytes() == 2 * 4 * 16 * 2 * 4 * 16
    assert manager.get_num_free_blocks() == 8


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (UnknownRequestError, lambda m: m.free("nobody"), "nobody"),
        (UnknownRequestError, lambda m: m.extend("nobody", 1), "nobody"),
        (UnknownRequestError, lambda m: m.get_block_table("nobody"), "nobody"),
        (UnknownRequestError, lambda m: m.step(["held"], [1], free=["nobody"]), "nobody"),
        (DuplicateRequestError, lambda m: m.allocate("held", 1), "held"),
        (DuplicateRequestError, lambda m: m.step(["x", "x"], [1, 1]), "x"),
        (DuplicateRequestError, lambda m: m.step(["held"], [1], free=["held"]), "held"),
        (RequestTooLongError, lambda m: m.allocate("x", 33), "at most 32"),
        (RequestTooLongError, lambda m: m.extend("held", 28), "at most 32"),
        (OutOfBlocksError, lambda m: m.allocate("x", 30), "6 free blocks"),
        (InvalidArgumentError, lambda m: m.allocate("x", -1), "-1"),
        (InvalidArgumentError, lambda m: m.allocate("x", 1.5), "1.5"),
        (InvalidArgumentError, lambda m: m.allocate("x", True), "True"),
        (InvalidArgumentError, lambda m: m.can_allocate("ten"), "ten"),
        (InvalidArgumentError, lambda m: m.step(["held"], [1, 2]), "want 1 integers"),
        (InvalidArgumentError, lambda m: m.step(["held"], [2]), "decode layout"),
        (InvalidArgumentError, lambda m: m.step(["held", "x"], [1, 1], num_rows=1), "num_rows: got 1"),
        (InvalidArgumentError, lambda m: m.step(["held"], [9], num_tokens=8), "num_tokens: got 8 for 9"),
        (InvalidArgumentError, lambda m: m.get_block_table("held", 2), "want 0 to 1"),
        (TooManyRequestsError, lambda m: m.step(list("wxyz"), [0, 0, 0, 0]), "3 of 4 rows"),
    ],
)
def test_bad_input_raises_and_changes_nothing(error: type[Exception], call: object, wanted: str) -> None:
    manager = make_manager()
    manager.allocate("held", 21)
    before = snapshot(manager)
    with pytest.raises(error, match=wanted):
        call(manager)
    assert_unchanged(before, manager)
    manager.check_invariants()


def test_double_free_is_an_unknown_request() -> None:
    manager = make_manager()
    manager.allocate("a", 4)
    manager.free("a")
    before = snapshot(manager)
    with pytest.raises(UnknownRequestError, match="'a'"):
        manager.free("a")
    assert_unchanged(before, manager)


def test_a_request_longer_than_the_pool_is_refused_up_front() -> None:
    manager = make_manager(num_blocks=3)
    with pytest.raises(RequestTooLongError, match="at most 12"):
        manager.allocate("a", 13)


def test_can_allocate_tells_what_allocate_will_do() -> None:
    manager = make_manager()
    manager.allocate("a", 21)
    for tokens in range(33):
        fits = manager.can_allocate(tokens)
        if fits:
            manager.allocate("probe", tokens)
            manager.free("probe")
        else:
            with pytest.raises(OutOfBlocksError):
                manager.allocate("probe", tokens)
    assert not manager.can_allocate(33)


def test_pressure_callback_can_make_room() -> None:
    manager = make_manager()
    manager.allocate("old", 32)
    seen: list[MemoryPressure] = []

    def drop_old(pressure: MemoryPressure) -> None:
        seen.append(pressure)
        manager.free("old")

    manager.on_memory_pressure(drop_old)
    assert len(manager.allocate("new", 20)) == 5
    assert seen == [MemoryPressure(("new",), 5, 4)]
    manager.check_invariants()


def test_a_raising_callback_leaves_allocate_as_it_was() -> None:
    manager = make_manager()
    manager.allocate("old", 32)

    def broken(pressure: MemoryPressure) -> None:
        raise RuntimeError("callback broke")

    manager.on_memory_pressure(broken)
    before = snapshot(manager)
    with pytest.raises(CallbackError, match="callback broke") as caught:
        manager.allocate("new", 20)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_unchanged(before, manager)


def test_a_raising_callback_does_not_disturb_a_step() -> None:
    manager = make_manager()
    manager.on_memory_pressure(lambda pressure: 1 / 0)
    told: list[MemoryPressure] = []
    manager.on_memory_pressure(told.append)
    plan = manager.step(["a", "b"], [32, 24], num_tokens=64)
    assert plan.ok.tolist() == [True, False]
    assert [type(error.__cause__) for error in plan.callback_errors] == [ZeroDivisionError]
    assert told == [MemoryPressure(("b",), 6, 4)]
    assert manager.request_ids() == ["a"]
    manager.check_invariants()


def test_threads_never_see_half_a_step() -> None:
    manager = make_manager(num_blocks=64, max_num_reqs=16)
    errors: list[BaseException] = []

    def worker(name: str) -> None:
        rng = np.random.default_rng(abs(hash(name)) % 1000)
        try:
            for _ in range(15):
                manager.allocate(name, int(rng.integers(1, 16)))
                manager.extend(name, int(rng.integers(0, 8)))
                assert len(manager.get_block_table(name)) == -(-manager.num_tokens(name) // BLOCK)
                manager.free(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert manager.get_num_free_blocks() == 64
    manager.check_invariants()
