"""``DigestMap`` against a dict, over digests that share their places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pyagent_kv_jax.manager.prefix import digest_map
from pyagent_kv_jax.manager.prefix.digest_map import WORDS, DigestMap

NUM_BLOCKS = 12
# All begin their search at one of three places, the last one of the array among them; each word tells some apart.
DIGESTS = np.array([[home, a, 7, b] for home in (0, 3, 2**40 + 63) for a in range(3) for b in (1, 2**63)], np.uint64)
choices = st.lists(st.integers(0, len(DIGESTS) - 1), max_size=NUM_BLOCKS)


class DigestMapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.map = DigestMap(NUM_BLOCKS)
        self.model: dict[int, int] = {}  # digest -> block

    def free_blocks(self) -> list[int]:
        return sorted(set(range(NUM_BLOCKS)) - set(self.model.values()))

    @rule(chosen=choices, data=st.data())
    def enter(self, chosen, data) -> None:
        digests = DIGESTS[chosen].reshape(-1, WORDS)
        places = self.map.claim(digests)
        first = [chosen.index(each) == i and each not in self.model for i, each in enumerate(chosen)]
        assert (places >= 0).tolist() == first
        blocks = data.draw(st.permutations(self.free_blocks()))
        filled = np.flatnonzero(places >= 0)[: len(blocks)]
        filled = filled[data.draw(st.lists(st.booleans(), min_size=len(filled), max_size=len(filled)))]
        self.map.fill(places[filled], digests[filled], np.array(blocks[: len(filled)], np.int32))
        self.map.release(np.delete(places, filled)[np.delete(places, filled) >= 0])
        self.model |= {chosen[i]: block for i, block in zip(filled.tolist(), blocks, strict=False)}

    @rule(data=st.data())
    def remove(self, data) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.model)))) if self.model else set()
        self.map.remove(np.array([self.model.pop(each) for each in gone], np.int32))

    @rule(data=st.data())
    def move(self, data) -> None:
        to = data.draw(st.permutations(range(NUM_BLOCKS)))
        old = sorted(self.model.values())
        self.map.move(np.array(old, np.int32), np.array([to[block] for block in old], np.int32))
        self.model = {each: to[block] for each, block in self.model.items()}

    @rule()
    def clear(self) -> None:
        self.map.clear()
        self.model = {}

    @invariant()
    def everything_is_found(self) -> None:
        self.map.check()
        assert len(self.map) == len(self.model)
        assert self.map.find(DIGESTS).tolist() == [self.model.get(i, -1) for i in range(len(DIGESTS))]
        blocks = self.map.blocks()
        assert blocks.tolist() == sorted(self.model.values())
        of_block = {block: each for each, block in self.model.items()}
        np.testing.assert_array_equal(self.map.digests_of(blocks), DIGESTS[[of_block[b] for b in blocks.tolist()]])


@pytest.mark.parametrize("few", [0, 4, 512])
def test_any_calls(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_map, "FEW", few)
    run_state_machine_as_test(
        DigestMapMachine, settings=settings(max_examples=50, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize("few", [0, 512])
def test_marks_of_removed_blocks_are_cleared_in_time(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More comings and goings than there are places."""
    monkeypatch.setattr(digest_map, "FEW", few)
    rng, a_map = np.random.default_rng(0), DigestMap(16)
    for _ in range(200):
        digests = rng.integers(0, 2**63, (16, WORDS)).astype(np.uint64)
        a_map.fill(a_map.claim(digests), digests, np.arange(16, dtype=np.int32))
        np.testing.assert_array_equal(a_map.find(digests), np.arange(16))
        a_map.check()
        a_map.remove(np.arange(16))
    assert not len(a_map)
    assert (a_map.find(digests) == -1).all()
