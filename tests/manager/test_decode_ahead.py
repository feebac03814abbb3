"""Decode steps from reserved blocks: who is served, what is asked of the control plane, what comes back."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.prediction import Calls
from pyagent_kv_jax import ConfigError, KVCacheConfig, KVCacheManager, ManagerOptions
from pyagent_kv_jax.config import LayerGroup
from pyagent_kv_jax.manager import control_plane

BLOCK, BLOCKS, ROWS, LONGEST = 4, 24, 6, 64
WINDOWS = (LayerGroup((0,), sliding_window=6), LayerGroup((1,)))


def manager(horizon: int, *, groups: tuple[LayerGroup, ...] = (), blocks: int = BLOCKS, **options) -> KVCacheManager:
    config = KVCacheConfig(
        num_layers=2,
        num_heads=1,
        head_dim=1,
        num_blocks=blocks,
        block_size=BLOCK,
        max_num_reqs=ROWS,
        max_model_len=LONGEST,
        layer_groups=groups,
    )
    return KVCacheManager(config, ManagerOptions(prediction_horizon=horizon, **options))


def decode(served: KVCacheManager, ids: list[str], free: tuple[str, ...] = ()):
    return served.step(ids, np.ones(len(ids), int), free=free, num_rows=ROWS)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), groups=st.sampled_from([(), WINDOWS]))
def test_serves_whom_a_manager_without_it_serves(data, groups) -> None:
    """Two managers, one that reserves and one that does not, through the same traffic: never a different answer."""
    plain, ahead = manager(0, groups=groups), manager(9, groups=groups)
    here: dict[str, int] = {}
    for number in range(30):
        free = tuple(name for name in here if data.draw(st.integers(0, 9)) == 0)
        ids = [name for name in here if name not in free and data.draw(st.integers(0, 9))]
        counts = [min(data.draw(st.integers(0, 4)), 1) for _ in ids]
        if len(here) - len(free) < ROWS and data.draw(st.integers(0, 3)) == 0:
            ids.append(f"r{number}")
            counts.append(data.draw(st.integers(1, 20)))
        ids, counts = ids[::-1], counts[::-1]
        tokens = ROWS * 20 if max(counts, default=0) > 1 else None
        plans = [each.step(ids, counts, free=free, num_rows=ROWS, num_tokens=tokens) for each in (plain, ahead)]
        for name in free:
            del here[name]
        assert plans[0].ok.tolist() == plans[1].ok.tolist()
        meta = [plan.metadata for plan in plans]
        assert (meta[0].kv_lens == meta[1].kv_lens).all()
        assert (meta[0].positions == meta[1].positions).all()
        assert ((meta[0].slot_mapping >= 0) == (meta[1].slot_mapping >= 0)).all()
        check_slots(ahead, meta[1], len(ids))
        for name, count, ok in zip(ids, counts, plans[1].ok, strict=True):
            if ok:
                here[name] = here.get(name, 0) + count
        assert plain.get_num_free_blocks() == ahead.get_num_free_blocks()
    ahead.check_invariants()
    assert {name: ahead.num_tokens(name) for name in ahead.request_ids()} == here
    for name in here:
        ahead.free(name)
    assert ahead.get_num_free_blocks() == BLOCKS


def check_slots(served: KVCacheManager, meta, num_rows: int) -> None:
    """Each written slot is in the column of the table that its position belongs to, and nobody else's."""
    slots = np.atleast_2d(meta.slot_mapping)
    tables = meta.block_tables.reshape(len(slots), *meta.block_tables.shape[-2:])
    starts = meta.query_start_loc
    for group, table in zip(slots, tables, strict=True):
        written = group[group >= 0]
        assert len(set(written.tolist())) == len(written)
        for row in range(num_rows):
            tokens = range(row, row + 1) if starts is None else range(starts[row], starts[row + 1])
            for token in tokens:
                if group[token] >= 0:
                    position = meta.positions[token]
                    assert group[token] == table[row, position // BLOCK] * BLOCK + position % BLOCK


def test_asks_once_in_a_horizon_and_holds_what_it_says() -> None:
    served = manager(8, blocks=100)
    ids = [f"r{i}" for i in range(ROWS)]
    served.step(ids, [5, 6, 7, 8, 9, 10], num_rows=ROWS, num_tokens=64)
    with Calls() as calls:
        for _ in range(40):
            assert decode(served, ids).ok.all()
    assert calls.number <= 40 / 8 + 1
    stats = served.stats()
    needed = sum(-(-(n + 40) // BLOCK) - -(-n // BLOCK) for n in range(5, 11))
    assert stats.num_prediction_hits + stats.num_prediction_misses == needed
    assert stats.num_prediction_hits > 4 * stats.num_prediction_misses
    in_use = 100 - served.get_num_free_blocks()
    assert in_use == sum(-(-(n + 40) // BLOCK) for n in range(5, 11))  # what is in reserve counts as free
    assert in_use == sum(len(served.get_block_table(name)) for name in ids)
    assert stats.num_reserved_blocks == (np.asarray(served._state.control.ref_counts()) > 0).sum() - in_use


def test_requests_that_end_are_freed_with_the_next_call() -> None:
    served = manager(8, blocks=100)
    served.step(["a", "b", "c"], [5, 5, 5], num_rows=ROWS, num_tokens=64)
    decode(served, ["a", "b", "c"])
    with Calls() as calls:
        decode(served, ["a", "b"], free=("c",))
        assert served.get_num_free_blocks() == 100 - 4
        assert calls.number == 0
        assert served.request_ids() == ["a", "b"]
    served.step(["c", "a"], [3, 1], num_rows=ROWS, num_tokens=64)  # the same id, a new request
    assert served.num_tokens("c") == 3
    served.check_invariants()
    served.step([], [], free=["a", "b", "c"])
    assert served.get_num_free_blocks() == 100
    assert served.stats().num_reserved_blocks == 0


def test_many_requests_that_end_between_two_calls_leave_nothing_behind() -> None:
    """More blocks come back than one step has room to free."""
    with mock.patch.object(control_plane, "_FREED_IN_A_STEP", 16):
        served = manager(8, blocks=100)
    ids = ["a", "b", "c", "d"]
    served.step(ids, [40, 41, 42, 43], num_rows=ROWS, num_tokens=256)
    for _ in range(4):
        decode(served, ids)
    decode(served, ["d"], free=("a", "b", "c"))
    served.step(["d", "e", "f", "g"], [1, 2, 3, 4], num_rows=ROWS, num_tokens=256)
    assert [served.num_tokens(name) for name in ("d", "e", "f", "g")] == [49, 2, 3, 4]
    served.check_invariants()


def test_a_fork_is_copied_before_it_is_written() -> None:
    served = manager(8, blocks=100)
    served.step(["a"], [6], num_rows=ROWS, num_tokens=64)
    decode(served, ["a"])
    served.fork("a", "b")
    decode(served, ["a", "b"])
    first, second = served.get_block_table("a"), served.get_block_table("b")
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert served.stats().num_copied_blocks >= 1
    with Calls() as calls:
        decode(served, ["a"], free=("b",))
        assert served.get_num_free_blocks() == 100 - 3  # what both held is still a's
        assert calls.number == 0


def test_what_is_set_aside_for_drafts_is_nobodys_reserve() -> None:
    """A decode step that names the request, and brings it no token, leaves its drafts' blocks alone."""
    plain, ahead = manager(0), manager(9)
    for served in (plain, ahead):
        served.step(["a", "b"], [4, 4], num_rows=ROWS, num_tokens=64)
        decode(served, ["a", "b"])
        served.reserve("a", 7)
        assert served.step(["a", "b"], [0, 1], num_rows=ROWS).ok.all()
        served.allocate("c", 48)
        served.allocate("d", (served.get_num_free_blocks()) * BLOCK)
        assert served.step(["a"], [8], num_rows=ROWS, num_tokens=64).ok.all()
    assert plain.get_num_free_blocks() == ahead.get_num_free_blocks()


def test_blocks_that_rejected_drafts_left_come_back_whatever_the_horizon() -> None:
    served, ids = manager(3), ["a", "b", "c"]
    served.step(ids, [4] * 3, num_rows=ROWS, num_tokens=64)
    for name in ids:
        served.reserve(name, 23)
    decode(served, ids)
    assert served.get_num_free_blocks() == 24 - 3 * 2  # 15 of them left by drafts; all rows reserve 12 at most
    served.reserve("a", 40)
    assert served.get_num_free_blocks() == 24 - 12 - 2 * 2
    served.allocate("d", 32)
    assert served.get_num_free_blocks() == 0
    served.check_invariants()


def test_between_two_calls_too_an_allocation_finds_what_no_window_sees() -> None:
    plain, ahead = manager(0, groups=WINDOWS), manager(9, groups=WINDOWS)
    for served in (plain, ahead):
        served.add_request("a", np.arange(40))
        served.step(["a"], [1], num_rows=ROWS, num_tokens=64)
        for number in range(30):
            decode(served, ["a"])
            if number % 13 != 12:  # so that a block can be filled and out of sight between two calls
                continue
            cached = np.flatnonzero(served._state.control.state.pool.cached)
            assert sorted(served._state.prefixes.cached_ids().tolist()) == cached.tolist()
    assert plain.stats().empty_slot_share == ahead.stats().empty_slot_share
    tokens = plain.get_num_free_blocks() // 2 * BLOCK
    for served in (plain, ahead):
        served.allocate("b", tokens)
        served.check_invariants()


def test_learns_that_requests_end_soon() -> None:
    served = manager(8, blocks=100)
    for number in range(40):
        served.step([f"r{number}"], [4], num_rows=ROWS, num_tokens=64)
        for _ in range(3):
            decode(served, [f"r{number}"])
        served.free(f"r{number}")
    served.step(["last"], [4], num_rows=ROWS, num_tokens=64)
    decode(served, ["last"])
    assert served.stats().num_reserved_blocks == 0  # the two tokens it is expected to have before it fit as it is


def test_nothing_compiles_after_warm_up() -> None:
    served = manager(8, blocks=30)
    served.warm_up(ROWS)
    served.warm_up(ROWS, 64)
    programs = [control_plane.packed_step, control_plane._give_back, control_plane._advance]
    before = [program._cache_size() for program in programs]
    ids = ["a", "b", "c"]
    served.step(ids, [5, 9, 13], num_rows=ROWS, num_tokens=64)
    for _ in range(12):
        decode(served, ids)
    assert not served.step([*ids, "d"], [1, 1, 1, 50], num_rows=ROWS, num_tokens=64).ok.all()  # gives the reserve back
    for _ in range(5):
        decode(served, ["a", "b"], free=("c",) if "c" in served.request_ids() else ())
    assert served.get_num_free_blocks() > 0
    assert [program._cache_size() for program in programs] == before


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="prediction_horizon"):
        ManagerOptions(prediction_horizon=-1)
