"""``KVCacheManager.step`` against a plain-Python model: who is served, with which slots, and what is left."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup, OutOfBlocksError, TooManyRequestsError
from pyagent_kv_jax.cache.grouped_rows import Hits
from pyagent_kv_jax.manager import control_plane, packed_step

BLOCK, BLOCKS, ROWS, LONGEST = 4, 11, 5, 24
CONFIG = KVCacheConfig(
    num_layers=1,
    num_heads=1,
    head_dim=2,
    num_blocks=BLOCKS,
    block_size=BLOCK,
    max_num_reqs=ROWS,
    max_model_len=LONGEST,
)
NAMES = [f"r{i}" for i in range(8)]


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class ManagerMachine(RuleBasedStateMachine):
    """The model is one dict: request id -> tokens."""

    @initialize()
    def start(self) -> None:
        self.manager = KVCacheManager(CONFIG)
        self.tokens: dict[str, int] = {}

    def free_blocks(self) -> int:
        return BLOCKS - sum(blocks_for(n) for n in self.tokens.values())

    def serve(self, ids: list[str], counts: list[int]) -> list[bool]:
        ok, blocked, free = [], False, self.free_blocks()
        for name, count in zip(ids, counts, strict=True):
            held = self.tokens.get(name, 0)
            need = blocks_for(held + count) - blocks_for(held)
            blocked = blocked or need > free
            ok.append(need == 0 or not blocked)
            if ok[-1]:
                free -= need
                self.tokens[name] = held + count
        return ok

    @rule(data=st.data(), decode=st.booleans())
    def step(self, data: st.DataObject, decode: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=ROWS))
        free = [name for name in self.tokens if name not in ids and data.draw(st.booleans())]
        kept = [name for name in self.tokens if name not in free]
        ids = [name for name in ids if name in kept] + [n for n in ids if n not in kept][: ROWS - len(kept)]
        most = [min(LONGEST - self.tokens.get(name, 0), 1 if decode else 12) for name in ids]
        counts = [data.draw(st.integers(0, n)) for n in most]
        starts = [self.tokens.get(name, 0) for name in ids]
        for name in free:
            del self.tokens[name]
        ok = self.serve(ids, counts)
        plan = self.manager.step(ids, counts, free=free, num_rows=ROWS, num_tokens=None if decode else 64)
        assert plan.ok.tolist() == ok
        assert plan.num_tokens.tolist() == [c if served else 0 for c, served in zip(counts, ok, strict=True)]
        self.check_metadata(plan.metadata, ids, starts, plan.num_tokens.tolist(), decode)

    def check_metadata(self, meta: object, ids: list[str], starts: list[int], granted: list[int], decode: bool) -> None:
        slots, positions = np.full(len(meta.slot_mapping), -1), np.zeros(len(meta.slot_mapping), int)
        at = 0
        for row, (name, start, count) in enumerate(zip(ids, starts, granted, strict=True)):
            at = row if decode else at
            table = self.manager.get_block_table(name) if name in self.tokens else []
            for position in range(start, start + count):
                slots[at] = table[position // BLOCK] * BLOCK + position % BLOCK
                positions[at] = position
                at += 1
            padded = table + [-1] * (LONGEST // BLOCK - len(table))
            assert meta.block_tables[row].tolist() == (padded if count else [-1] * len(padded))
            assert meta.kv_lens[row] == (start + count if count else 0)
        np.testing.assert_array_equal(meta.slot_mapping, slots)
        np.testing.assert_array_equal(meta.positions, positions)
        assert (meta.kv_lens[len(ids) :] == 0).all()
        if not decode:
            ends = np.cumsum(granted).tolist()
            assert meta.query_start_loc.tolist() == [0, *ends, *[(ends or [0])[-1]] * (ROWS - len(ids))]

    @rule(name=st.sampled_from(NAMES), count=st.integers(0, LONGEST))
    def allocate_or_extend(self, name: str, count: int) -> None:
        if self.tokens.get(name, 0) + count > LONGEST:
            return
        call = self.manager.extend if name in self.tokens else self.manager.allocate
        if name not in self.tokens and len(self.tokens) == ROWS:
            with pytest.raises(TooManyRequestsError):
                call(name, count)
        elif self.serve([name], [count])[0]:
            assert len(call(name, count)) == blocks_for(self.tokens[name])
        else:
            with pytest.raises(OutOfBlocksError):
                call(name, count)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.tokens:
            name = data.draw(st.sampled_from(sorted(self.tokens)))
            self.manager.free(name)
            del self.tokens[name]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert set(self.manager.request_ids()) == set(self.tokens)
        assert self.manager.get_num_free_blocks() == self.free_blocks()
        for name, count in self.tokens.items():
            assert self.manager.num_tokens(name) == count
            assert len(self.manager.get_block_table(name)) == blocks_for(count)
        self.manager.check_invariants()


ManagerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestManagerMachine = ManagerMachine.TestCase


def test_a_second_step_compiles_nothing() -> None:
    config = dataclasses.replace(CONFIG, max_model_len=20)
    manager = KVCacheManager(config)

    def work(names: list[str]) -> None:
        manager.step(names, [7, 3], num_rows=4, num_tokens=32)
        manager.step(names, [1, 1], num_rows=4)
        manager.step(names[:1], [1], free=names[1:], num_rows=4)
        manager.free(names[0])
        manager.allocate(names[0], len(names[0]))
        manager.free(names[0])

    work(["a", "b"])
    programs = (packed_step.packed_step, control_plane._admit, control_plane._free)
    sizes = [program._cache_size() for program in programs]
    work(["longer", "name"])
    assert sizes == [program._cache_size() for program in programs]


def test_freeing_more_rows_than_one_call_has_room_for() -> None:
    manager = KVCacheManager(dataclasses.replace(CONFIG, num_blocks=30))
    for name in NAMES[:5]:
        manager.allocate(name, 21)  # 6 blocks each, the width of a row and the capacity of one call
    plan = manager.step(["new"], [24], free=NAMES[:5], num_tokens=24)
    assert plan.ok.all()
    assert manager.get_num_free_blocks() == 24
    manager.check_invariants()


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("num_hits", [0, 512])
@pytest.mark.parametrize("windows", [(None,), (64, None)])
def test_the_control_state_is_updated_in_place(windows: tuple[int | None, ...], num_hits: int, copies: bool) -> None:
    """1,000,000 blocks: a step's temporaries do not grow with the pool, whatever it does."""
    groups = tuple(LayerGroup((layer,), sliding_window=window) for layer, window in enumerate(windows))
    config = dataclasses.replace(
        CONFIG, num_layers=len(groups), layer_groups=groups, num_blocks=1_000_000, max_num_reqs=256, max_model_len=4096
    )
    plane = control_plane.ControlPlane(config)
    shape = packed_step.StepShape(256, len(groups), 256, None, 256, 1024, 1024, 1024, copies, 4096, copies)
    hits = Hits(np.zeros(num_hits, np.int32), np.zeros(256, np.int32)) if num_hits else None
    words, drafts = np.zeros(shape.inputs()["end"].stop, np.int32), np.zeros(256, np.int32)
    lowered = packed_step.packed_step.lower(plane._state, words, hits, drafts, shape=shape)
    memory = lowered.compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(plane._state))
    assert memory.alias_size_in_bytes >= size
    batch_tables = 256 * 1024 * 4 * len(groups)
    assert memory.temp_size_in_bytes < 2 * batch_tables
