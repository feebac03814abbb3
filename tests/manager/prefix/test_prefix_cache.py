"""``PrefixCache`` against a model that says the rules token by token, with digests that collide all the time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, InvalidBlockError, ShapeMismatchError
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, BlockKeys
from pyagent_kv_jax.manager.prefix.events import BlockRemoved
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixCache, PrefixHit
from pyagent_kv_jax.manager.prefix.prefix_search import LocalSearch, Reach
from tests.manager.prefix.prefix_model import Model, Request

POOL = 24
# windows, chunks, block size
LAYOUTS = [
    ((None,), (None,), 2),
    ((None, None), (None, None), 1),
    ((3,), (None,), 2),
    ((None, 1, 5), (None, None, None), 2),
    ((None, None), (None, 6), 3),
    ((None, 4, None, 3), (None, None, 4, 5), 3),
]
ALGORITHMS = ["sha256", lambda data: bytes([sum(data) % 4]), lambda data: b"!"]

layouts = st.sampled_from(LAYOUTS)
blocks_or_none = st.integers(-1, POOL - 1)
MAX_REQUESTS, MAX_BLOCKS = 5, 8


def assert_same_hit(got: PrefixHit, want: PrefixHit) -> None:
    assert (got.num_tokens, got.limited_by) == (want.num_tokens, want.limited_by)
    assert got.blocks.dtype == np.int32
    np.testing.assert_array_equal(got.blocks, want.blocks)


class CacheMachine(RuleBasedStateMachine):
    """Requests over tokens 0 and 1, so that they share prefixes, forking and growing, against the model."""

    @initialize(layout=layouts, algorithm=st.sampled_from(ALGORITHMS))
    def make(self, layout, algorithm) -> None:
        windows, chunks, self.size = layout
        self.cache = PrefixCache(POOL, self.size, windows, chunks)
        self.model = Model(*layout)
        self.hasher = BlockHasher(self.size, algorithm)
        self.requests = [Request(self.hasher, None, [])]
        self.num_groups = len(windows)
        self.steps = 0

    def draw_request(self, data) -> Request:
        return data.draw(st.sampled_from(self.requests))

    def draw_tokens(self, data, max_blocks: int) -> list[int]:
        length = self.size * data.draw(st.integers(0, max_blocks))
        return data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))

    def add(self, request: Request) -> None:
        self.requests = [*self.requests[1 - MAX_REQUESTS :], request]

    @rule(data=st.data(), salt=st.sampled_from([None, "s"]))
    def start(self, data, salt) -> None:
        base = self.draw_request(data).tokens
        shared = base[: self.size * data.draw(st.integers(0, len(base) // self.size))]
        tokens = shared + self.draw_tokens(data, MAX_BLOCKS)
        self.add(Request(self.hasher, salt, tokens[: MAX_BLOCKS * self.size]))

    @rule(data=st.data())
    def grow(self, data) -> None:
        request = self.draw_request(data)
        tokens = self.draw_tokens(data, MAX_BLOCKS - len(request))
        request.tokens = request.tokens + tokens
        request.keys.extend(np.array(tokens, np.int32))

    @rule(data=st.data())
    def fork(self, data) -> None:
        parent = self.draw_request(data)
        child = Request(self.hasher, parent.salt, parent.tokens)
        child.keys = parent.keys.copy()
        self.add(child)

    @rule(data=st.data())
    def fill(self, data) -> None:
        """A request's blocks in every group, where there are free ones, as a step would enter them."""
        request = self.draw_request(data)
        for group in range(self.num_groups):
            free = sorted(set(range(POOL)) - self.model.ids())[: len(request)]
            self.insert_both(group, request, 0, free)

    @rule(data=st.data())
    def insert(self, data) -> None:
        request, group = self.draw_request(data), data.draw(st.integers(0, self.num_groups - 1))
        first = data.draw(st.integers(0, len(request)))
        self.insert_both(group, request, first, data.draw(st.lists(blocks_or_none, max_size=len(request) - first)))

    def insert_both(self, group: int, request: Request, first: int, ids: list[int]) -> None:
        entered = self.cache.insert(group, request.keys, first, np.array(ids, np.int32))
        want = [block for i, block in enumerate(ids) if self.model.insert(group, request, first + i, block)]
        assert entered.tolist() == want

    @rule(data=st.data())
    def claim(self, data) -> None:
        """Blocks of several requests at once, told apart from their ids, some of which come to nothing."""
        chosen = data.draw(st.lists(st.sampled_from(self.requests), max_size=4))
        runs = []
        for request in chosen:
            first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(request))] * 2)))
            runs.append((request, first, last))
        claim = self.cache.claim([(request.keys, first, last) for request, first, last in runs])
        if claim is None:
            assert self.hasher.algorithm != "sha256" or not runs
            return
        entries = [(request, index) for request, first, last in runs for index in range(first, last)]
        for group in range(self.num_groups):
            free = sorted(set(range(POOL)) - self.model.ids())
            ids = [data.draw(st.sampled_from([-1, free.pop()])) if free else -1 for _ in entries]
            entered = self.cache.enter(group, claim, np.array(ids, np.int32))
            want, places = [], set()
            for (request, index), block in zip(entries, ids, strict=True):
                content = repr(request.content(index))
                if content not in places and self.model.insert(group, request, index, block):
                    want.append(block)
                places.add(content)  # the first of equal ones has the place, whatever comes of it
            assert entered.tolist() == want

    @rule(ids=st.lists(st.integers(-2, POOL + 2), max_size=4), as_array=st.booleans())
    def forget(self, ids, as_array) -> None:
        removed = self.cache.forget(np.array(ids, np.int32) if as_array else ids)
        want: list[tuple[int, int, bytes]] = []
        for block in ids:
            for (group, key), (_, held) in list(self.model.entries.items()):
                if held == block:
                    want.append((group, block, key))
                    del self.model.entries[group, key]
        got = [(e.group, block, key) for e in removed for block, key in zip(e.block_ids, e.keys, strict=True)]
        assert got == sorted(want, key=lambda entry: entry[0])
        assert len({event.group for event in removed}) == len(removed)

    @rule(data=st.data(), ids=st.lists(st.integers(0, POOL - 1), unique=True, max_size=6))
    def remap(self, data, ids) -> None:
        free = sorted(set(range(POOL)) - self.model.ids() - set(ids))
        new = data.draw(st.permutations(ids + free))[: len(ids)]
        self.cache.remap(ids, new)
        moved = dict(zip(ids, new, strict=True))
        self.model.entries = {
            place: (content, moved.get(block, block)) for place, (content, block) in self.model.entries.items()
        }

    @rule(chance=st.integers(0, 9))
    def reset(self, chance) -> None:
        if chance == 0:
            self.cache.reset()
            self.model.entries.clear()

    @invariant()
    def hits_agree(self) -> None:
        self.steps += 1
        short = self.steps % (2 * self.size)
        for request in self.requests:
            keys = request.keys if self.steps % 3 else request.keys.copy()  # a copy learns of no stored content
            max_tokens = max(0, len(request.tokens) + 1 - short)
            assert_same_hit(self.cache.lookup(keys, max_tokens), self.model.lookup(request, max_tokens))

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        assert set(self.cache.cached_ids().tolist()) == self.model.ids()
        assert len(self.cache) == len(self.cache.cached_ids()) == len(self.model.ids())
        assert self.cache.num_collisions == self.model.collisions
        named = {block: key for (_, key), (_, block) in self.model.entries.items()}
        assert [self.cache.key_of(block) for block in range(POOL)] == [named.get(block) for block in range(POOL)]

    @rule(data=st.data())
    def ids_of_a_chain(self, data) -> None:
        request = self.draw_request(data)
        rows = [[self.model.block(g, request, i) for i in range(len(request))] for g in range(self.num_groups)]
        blocks = self.cache.blocks_of(request.keys)
        assert blocks.shape == (self.num_groups, len(request))
        assert blocks.tolist() == rows
        assert self.cache.cached_ids(request.keys).tolist() == [block for row in rows for block in row if block >= 0]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@given(st.data(), st.integers(1, 4), st.sampled_from(ALGORITHMS[:2]))
@settings(max_examples=300, deadline=None)
def test_lookup_over_any_windows_chunks_and_holes(data, size, algorithm) -> None:
    spans = st.none() | st.integers(1, 14)
    reaches = data.draw(st.lists(st.tuples(spans, spans), min_size=1, max_size=3))
    windows, chunks = zip(*reaches, strict=True)
    length = data.draw(st.integers(1, 8))
    request = Request(BlockHasher(size, algorithm), None, list(range(length * size)))
    cache, model = PrefixCache(3 * length, size, windows, chunks), Model(windows, chunks, size)
    for group in range(len(reaches)):
        # Mostly there, so that long prefixes are common.
        ids = [
            group * length + index if data.draw(st.integers(0, 3)) or group < data.draw(st.integers(0, 1)) else -1
            for index in range(length)
        ]
        cache.insert(group, request.keys, 0, ids)
        for index, block in enumerate(ids):
            model.insert(group, request, index, block)
    for max_tokens in range(length * size + 2):
        again = Request(request.keys.hasher, None, request.tokens)
        assert_same_hit(cache.lookup(again.keys, max_tokens), model.lookup(again, max_tokens))


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_a_search_looks_at_no_block_twice(data, size, questions) -> None:
    reach = Reach(size, data.draw(st.none() | st.integers(1, 12)), data.draw(st.none() | st.integers(1, 12)))
    held = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
    asked: list[int] = []
    search = LocalSearch(reach, lambda index: asked.append(index) or (index if held[index] else None))
    lengths = sorted(data.draw(st.lists(st.integers(0, 12), min_size=questions, max_size=questions)), reverse=True)
    answer = 12
    for length in lengths:
        answer = search.longest(min(length, answer))
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_lookups_at_once_are_lookups_one_by_one(algorithm) -> None:
    hasher, rng = BlockHasher(2, algorithm), np.random.default_rng(0)
    cache = PrefixCache(64, 2, (None, 5))
    requests = [Request(hasher, None, rng.integers(0, 2, 2 * n).tolist()) for n in (3, 0, 7, 7, 1, 5)]
    for first, request in enumerate(requests[::2]):
        for group in range(2):
            cache.insert(group, request.keys, 0, 20 * group + 7 * first + np.arange(len(request)))
    asked = [(request.keys, max(2 * len(request) - 1, 0)) for request in requests for _ in range(2)]
    assert any(hit.num_tokens for hit in cache.lookup_many(asked))
    for got, (keys, most) in zip(cache.lookup_many(asked), asked, strict=True):
        assert_same_hit(got, cache.lookup(keys, most))


def test_the_last_token_is_left_to_compute() -> None:
    request = Request(BlockHasher(2), None, [1, 2, 3, 4])
    cache = PrefixCache(4, 2)
    cache.insert(0, request.keys, 0, [2, 3])
    assert cache.lookup(request.keys, 4 - 1).num_tokens == 2
    assert cache.lookup(request.keys, 4).num_tokens == 4
    assert cache.minimum_reusable_length == 3
    assert cache.lookup(request.keys, cache.minimum_reusable_length - 1).num_tokens == 2
    assert cache.lookup(request.keys, cache.minimum_reusable_length - 2).num_tokens == 0


def test_which_group_limits_a_hit() -> None:
    request = Request(BlockHasher(2), None, list(range(12)))
    cache = PrefixCache(40, 2, (None, 5, 5))
    for group in range(3):
        cache.insert(group, request.keys, 0, range(6 * group, 6 * group + 6))
    assert cache.lookup(request.keys, 12).limited_by is None
    assert cache.lookup(request.keys, 12).blocks.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [-1] * 4 + [10, 11],
        [-1] * 4 + [16, 17],
    ]
    cache.forget([16])  # block 4 of group 2
    assert cache.lookup(request.keys, 11)[::2] == (8, 2)
    cache.forget([10])
    assert cache.lookup(request.keys, 11)[::2] == (8, 1)
    cache.forget([4])
    assert cache.lookup(request.keys, 11)[::2] == (8, None)
    cache.forget([1])
    assert cache.lookup(request.keys, 11)[::2] == (2, 0)


def test_a_collision_is_counted_and_never_hit() -> None:
    hasher = BlockHasher(2, lambda data: b"same")
    one, two, equal = (Request(hasher, None, tokens) for tokens in ([1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4]))
    cache = PrefixCache(8, 2)
    assert cache.insert(0, one.keys, 1, [1]).tolist() == [1]
    assert cache.insert(0, two.keys, 1, [2]).tolist() == []
    assert cache.num_collisions == 1
    assert cache.insert(0, equal.keys, 1, [3]).tolist() == []
    assert cache.num_collisions == 1  # a duplicate is none
    assert cache.blocks_of(two.keys).tolist() == [[-1, -1]]
    assert cache.blocks_of(equal.keys).tolist() == [[-1, 1]]
    assert equal.keys.nodes == one.keys.nodes  # so that the next comparison is by identity


def test_equal_keys_in_two_groups_are_two_blocks() -> None:
    request = Request(BlockHasher(2), None, [1, 2])
    cache = PrefixCache(8, 2, (None, 4))
    cache.insert(0, request.keys, 0, [3])
    assert cache.insert(1, request.keys, 0, [3]).tolist() == []  # a block belongs to one group
    cache.insert(1, request.keys, 0, [4])
    key = request.keys.digests[0]
    assert cache.forget([4, 3]) == [BlockRemoved(0, (3,), (key,)), BlockRemoved(1, (4,), (key,))]


def filled(algorithm="sha256") -> tuple[PrefixCache, BlockKeys]:
    request = Request(BlockHasher(2, algorithm), None, [1, 2, 3, 4, 5, 6])
    cache = PrefixCache(8, 2, (None, 3))
    cache.insert(0, request.keys, 0, [0, 1, 2])
    cache.insert(1, request.keys, 0, [3, 4])
    return cache, request.keys


other_keys = Request(BlockHasher(2, "sha256"), "s", [1, 2, 3, 4]).keys


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c, k: c.lookup(k, -1), InvalidArgumentError, "max_tokens: got -1"),
        (lambda c, k: c.lookup(Request(BlockHasher(3), None, [1, 2, 3]).keys, 5), InvalidArgumentError, "block_size=3"),
        (lambda c, k: c.lookup(BlockHasher(2, lambda b: b).start(), 5), InvalidArgumentError, "algorithm"),
        (lambda c, k: c.insert(2, k, 0, [5]), InvalidArgumentError, "group: got 2"),
        (lambda c, k: c.insert(-1, k, 0, [5]), InvalidArgumentError, "group: got -1"),
        (lambda c, k: c.insert(1, k, 2, [5, 6]), InvalidArgumentError, "blocks 2 to 3"),
        (lambda c, k: c.insert(1, k, -1, [5]), InvalidArgumentError, "blocks -1 to -1"),
        (lambda c, k: c.insert(0, other_keys, 0, [5, 8]), InvalidBlockError, r"got \[8\]"),
        (lambda c, k: c.insert(0, other_keys, 0, [5, -2]), InvalidBlockError, r"got \[-2\]"),
        (lambda c, k: c.insert(0, other_keys, 0, [5.0]), ShapeMismatchError, "float64"),
        (lambda c, k: c.insert(0, other_keys, 0, np.array([[5]])), ShapeMismatchError, r"\[1, 1\]"),
        (lambda c, k: c.claim([(other_keys, 0, 1), (other_keys, 1, 3)]), InvalidArgumentError, "blocks 1 to 2"),
        (lambda c, k: c.claim([(other_keys, -1, 1)]), InvalidArgumentError, "blocks -1 to 0"),
        (lambda c, k: c.claim([(BlockHasher(3).start(), 0, 0)]), InvalidArgumentError, "block_size=3"),
        (lambda c, k: c.remap([0, 1], [5]), InvalidArgumentError, "2 old and 1 new"),
        (lambda c, k: c.remap([0, 0], [5, 6]), InvalidBlockError, "twice"),
        (lambda c, k: c.remap([0, 1], [5, 5]), InvalidBlockError, "twice"),
        (lambda c, k: c.remap([0], [8]), InvalidBlockError, r"got \[8\]"),
        (lambda c, k: c.remap([-1], [5]), InvalidBlockError, r"got \[-1\]"),
        (lambda c, k: c.remap([0, 6], [6, 3]), InvalidBlockError, r"\[3\]"),
    ],
)
def test_bad_calls_change_nothing(call, error, match: str) -> None:
    cache, keys = filled()
    before = cache.blocks_of(keys).tolist()
    with pytest.raises(error, match=match):
        call(cache, keys)
    cache.check()
    assert cache.blocks_of(keys).tolist() == before
    assert sorted(cache.cached_ids().tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 2), "num_blocks"),
        ((4, 0), "block_size"),
        ((4, 2, ()), "0 windows"),
        ((4, 2, (0,)), "windows"),
        ((4, 2, (None,), (0,)), "chunks"),
        ((4, 2, (None, 3), (2,)), "2 windows and 1 chunks"),
    ],
)
def test_sizes_that_cannot_work(arguments, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PrefixCache(*arguments)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c._group_of.__setitem__(1, -1),
        lambda c: c._group_of.__setitem__(7, 0),
        lambda c: c._maps[0].remove(np.array([1])),
        lambda c: c._maps[0].move(np.array([1]), np.array([6])),
        lambda c: c._maps[0]._digests.__setitem__(1, 5),
        lambda c: c._maps[0]._place_of.__setitem__(1, c._maps[0]._place_of[2]),
        lambda c: c._maps[1].fill(c._maps[1].claim(c._maps[0]._digests[:1]), c._maps[0]._digests[:1], np.array([0])),
        lambda c: c._content_of.pop(1),
    ],
)
def test_check_sees_damage(damage) -> None:
    cache, _ = filled(lambda data: hashlib.sha256(data).digest())
    cache.check()
    damage(cache)
    with pytest.raises(InvalidBlockError):
        cache.check()
