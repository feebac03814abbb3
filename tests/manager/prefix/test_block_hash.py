"""Keys of blocks: what they are made of, that nothing else is, and that weak digests are backed by content."""

from __future__ import annotations

import builtins
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, ShapeMismatchError
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, BlockKeys, CacheExtras, MultimodalItem

BLOCK = 3


def tokens_of(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def keys_of(hasher: BlockHasher, extras: CacheExtras, tokens: np.ndarray) -> BlockKeys:
    keys = hasher.start(extras)
    keys.extend(tokens)
    return keys


def meaning(extras: CacheExtras, tokens: list[int], index: int, size: int) -> object:
    """What the key of block ``index`` must stand for, said without any bytes."""
    end = (index + 1) * size
    items = sorted((item.start, item.length, item.item_id) for item in extras.items if item.start < end)
    return extras.salt, extras.adapter, tuple(tokens[:end]), tuple(items)


texts = st.text(alphabet="ab\x00\ud800é", min_size=1, max_size=3)
items = st.builds(MultimodalItem, texts, st.integers(0, 8), st.integers(1, 5))
extras_strategy = st.builds(
    CacheExtras,
    salt=st.none() | texts,
    adapter=st.none() | st.tuples(texts, st.text(alphabet="ab", max_size=2)),
    items=st.lists(items, max_size=2).map(tuple),
)
prompts = st.lists(st.integers(0, 1), min_size=6, max_size=9).map(lambda tokens: tokens[: len(tokens) // BLOCK * BLOCK])


@given(extras_strategy, prompts, extras_strategy, prompts)
@settings(max_examples=500, deadline=None)
def test_two_inputs_share_a_key_exactly_where_they_mean_the_same(a, a_tokens, b, b_tokens) -> None:
    hasher = BlockHasher(BLOCK)
    a_keys, b_keys = keys_of(hasher, a, tokens_of(*a_tokens)), keys_of(hasher, b, tokens_of(*b_tokens))
    for i, a_key in enumerate(a_keys.digests):
        for j, b_key in enumerate(b_keys.digests):
            same = meaning(a, a_tokens, i, BLOCK) == meaning(b, b_tokens, j, BLOCK)
            assert (a_key == b_key) == same


@given(st.data(), extras_strategy, prompts)
@settings(max_examples=300, deadline=None)
def test_one_small_change_is_another_key(data, extras, tokens) -> None:
    """Nearby inputs, where an encoding without lengths would be ambiguous."""
    salt, adapter, old_items = extras.salt or "", extras.adapter or ("", ""), extras.items
    whole = salt + "".join(adapter) + "".join(item.item_id for item in old_items) + "ab"
    cuts = sorted(data.draw(st.integers(1, len(whole))) for _ in range(3))
    parts = [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] : cuts[2]], whole[cuts[2] :]]
    other = CacheExtras(
        parts[0],
        (parts[1], parts[2]) if parts[1] else None,
        (MultimodalItem(parts[3], 0, 1),) if parts[3] else (),
    )
    hasher = BlockHasher(BLOCK)
    one, two = keys_of(hasher, extras, tokens_of(*tokens)), keys_of(hasher, other, tokens_of(*tokens))
    for index, (a, b) in enumerate(zip(one.digests, two.digests, strict=True)):
        assert (a == b) == (meaning(extras, tokens, index, BLOCK) == meaning(other, tokens, index, BLOCK))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (CacheExtras(adapter=("ab", "c")), CacheExtras(adapter=("a", "bc"))),
        (CacheExtras(salt="ab"), CacheExtras(salt="a", adapter=("b", ""))),
        (CacheExtras(salt="a"), CacheExtras(adapter=("a", ""))),
        (CacheExtras(items=(MultimodalItem("a", 0, 2),)), CacheExtras(items=(MultimodalItem("a", 1, 2),))),
        (CacheExtras(items=(MultimodalItem("a", 0, 2),)), CacheExtras(items=(MultimodalItem("a", 0, 3),))),
        (
            CacheExtras(items=(MultimodalItem("a", 0, 1), MultimodalItem("b", 1, 1))),
            CacheExtras(items=(MultimodalItem("b", 0, 1), MultimodalItem("a", 1, 1))),
        ),
        (CacheExtras(), CacheExtras(salt="a")),
        (CacheExtras(salt="\ud800"), CacheExtras(salt="?")),
        (CacheExtras(salt="\ud800"), CacheExtras(salt="\udc00")),
    ],
)
def test_fields_do_not_run_into_each_other(one: CacheExtras, two: CacheExtras) -> None:
    hasher = BlockHasher(BLOCK)
    a, b = (keys_of(hasher, extras, tokens_of(1, 2, 3, 4, 5, 6)).digests for extras in (one, two))
    assert a[0] != b[0]
    assert a[1] != b[1]


def test_an_item_enters_every_block_it_overlaps_and_through_the_chain_the_later_ones() -> None:
    hasher, tokens = BlockHasher(2), tokens_of(1, 2, 3, 4, 5, 6, 7, 8)
    plain = keys_of(hasher, CacheExtras(), tokens).digests
    late = keys_of(hasher, CacheExtras(items=(MultimodalItem("cat", 3, 3),)), tokens)
    assert [a == b for a, b in zip(plain, late.digests, strict=True)] == [True, False, False, False]
    weak = keys_of(BlockHasher(2, lambda data: b""), late.extras, tokens)
    bare = [np.arange(2 * i + 1, 2 * i + 3, dtype="<i4").tobytes() for i in range(4)]
    name = (3).to_bytes(8, "little") + b"cat"
    assert [node.payload for node in weak.nodes] == [
        bare[0],
        bare[1] + name + (1).to_bytes(8, "little") + (3).to_bytes(8, "little"),
        bare[2] + name + (-1).to_bytes(8, "little", signed=True) + (3).to_bytes(8, "little"),
        bare[3],
    ]


def test_order_of_items_does_not_matter() -> None:
    pair = (MultimodalItem("video", 0, 5), MultimodalItem("sound", 1, 2))
    hasher, tokens = BlockHasher(BLOCK), tokens_of(*range(6))
    a = keys_of(hasher, CacheExtras(items=pair), tokens)
    b = keys_of(hasher, CacheExtras(items=pair[::-1]), tokens)
    assert a.digests == b.digests


def test_digests_are_these_on_every_platform_and_in_every_process() -> None:
    extras = CacheExtras("tenant", ("lora", "/models/lora"), (MultimodalItem("image", 1, 2),))
    keys = keys_of(BlockHasher(2), extras, tokens_of(1, 2, -3, 2**31 - 1))

    def number(value: int) -> bytes:
        return value.to_bytes(8, "little", signed=True)

    def text(value: str) -> bytes:
        return number(len(value)) + value.encode()

    root = b"kv block chain 1" + number(2) + number(1) + text("tenant") + number(2) + text("lora")
    digest = hashlib.sha256(root + text("/models/lora")).digest()
    for values, offset in [((1, 2), 1), ((-3, 2**31 - 1), -1)]:
        block = b"".join(value.to_bytes(4, "little", signed=True) for value in values)
        digest = hashlib.sha256(digest + block + text("image") + number(offset) + number(2)).digest()
    assert keys.digests[1] == digest
    assert digest.hex() == "a8af7b2068228f99413b81d5028050b5b893576565b84f6ce4bdf944ef617708"
    plain = keys_of(BlockHasher(16), CacheExtras(), np.arange(16, dtype=np.int32))
    assert plain.digests[0].hex() == "3c75440de0c47fddd706d6646d2d6bf95386220760e826d48f4e8a70c23c82c5"


def test_block_sizes_do_not_mix() -> None:
    whole = keys_of(BlockHasher(4), CacheExtras(), tokens_of(1, 2, 3, 4)).digests
    halves = keys_of(BlockHasher(2), CacheExtras(), tokens_of(1, 2, 3, 4)).digests
    assert not set(whole) & set(halves)


@given(st.data(), extras_strategy, st.sampled_from(["sha256", lambda data: data[-1:]]))
@settings(max_examples=100, deadline=None)
def test_keys_do_not_depend_on_how_they_grew(data, extras, algorithm) -> None:
    hasher = BlockHasher(BLOCK, algorithm)
    tokens = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=12, max_size=12)), np.int32)
    cuts = sorted(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    grown = hasher.start(extras)
    for begin, end in zip([0, *cuts], [*cuts, 4], strict=True):
        grown.extend(tokens[begin * BLOCK : end * BLOCK])
    whole = keys_of(hasher, extras, tokens)
    assert grown.digests == whole.digests
    assert len(grown) == len(whole) == 4
    if grown.nodes is not None:
        assert [node.payload for node in grown.nodes] == [node.payload for node in whole.nodes]
        parents = [node.parent for node in grown.nodes]
        assert parents == [grown.root_node, *grown.nodes[:-1]]


def test_strided_and_empty_tokens() -> None:
    hasher = BlockHasher(BLOCK)
    every_other = np.arange(12, dtype=np.int32)[::2]
    a = keys_of(hasher, CacheExtras(), every_other)
    assert a.digests == keys_of(hasher, CacheExtras(), every_other.copy()).digests
    a.extend(np.empty(0, np.int32))
    assert len(a) == 2
    big_endian = every_other.astype(">i4")
    with pytest.raises(ShapeMismatchError, match=r"want a numpy array int32"):
        a.extend(big_endian)


def test_a_fork_grows_apart() -> None:
    hasher = BlockHasher(BLOCK, lambda data: data[-1:])
    parent = keys_of(hasher, CacheExtras("salt"), tokens_of(1, 2, 3))
    child = parent.copy()
    child.extend(tokens_of(4, 5, 6))
    parent.extend(tokens_of(7, 8, 9))
    assert [len(parent), len(child), len(parent.nodes), len(child.nodes)] == [2] * 4
    assert parent.digests == keys_of(hasher, parent.extras, tokens_of(1, 2, 3, 7, 8, 9)).digests
    assert child.digests == keys_of(hasher, parent.extras, tokens_of(1, 2, 3, 4, 5, 6)).digests
    assert child.parent_of(0) is None
    assert child.parent_of(1) == child.digests[0]


def test_xxh3_128() -> None:
    xxhash = pytest.importorskip("xxhash")
    keys = keys_of(BlockHasher(2, "xxh3_128"), CacheExtras(), tokens_of(1, 2))
    root = b"kv block chain 1" + (2).to_bytes(8, "little") + bytes(16)
    block = (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert keys.digests == [xxhash.xxh3_128(xxhash.xxh3_128(root).digest() + block).digest()]
    assert not keys.hasher.is_collision_resistant
    assert keys.nodes is not None


def test_xxh3_128_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "xxhash":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="needs the package xxhash"):
        BlockHasher(16, "xxh3_128")


def test_only_sha256_needs_no_content() -> None:
    assert BlockHasher(2).is_collision_resistant
    assert keys_of(BlockHasher(2), CacheExtras(), tokens_of(1, 2)).nodes is None
    assert not BlockHasher(2, lambda data: hashlib.sha256(data).digest()).is_collision_resistant


weak = BlockHasher(2, lambda data: b"x")


@given(st.lists(st.integers(0, 1), min_size=8, max_size=8), st.lists(st.integers(0, 1), min_size=8, max_size=8))
@settings(max_examples=200, deadline=None)
def test_matches_is_equality_of_the_whole_chain(a, b) -> None:
    for a_salt, b_salt in [(None, None), ("s", "s"), ("s", "t"), (None, "s")]:
        for i in range(4):
            for j in range(4):
                one = keys_of(weak, CacheExtras(a_salt), tokens_of(*a))
                two = keys_of(weak, CacheExtras(b_salt), tokens_of(*b))
                same = (a_salt, a[: 2 * i + 2]) == (b_salt, b[: 2 * j + 2])
                assert one.matches(i, two.nodes[j]) == same


def test_after_a_match_the_chain_is_the_stored_one() -> None:
    class Payload(bytes):
        compared = 0

        def __ne__(self, other: object) -> bool:
            Payload.compared += 1
            return bytes.__ne__(self, other)

    tokens = np.arange(200, dtype=np.int32)
    stored, mine = keys_of(weak, CacheExtras("s"), tokens), keys_of(weak, CacheExtras("s"), tokens)
    for node in mine.nodes:
        node.payload = Payload(node.payload)
    assert mine.matches(59, stored.nodes[59])
    assert Payload.compared == 60
    assert mine.nodes[:60] == stored.nodes[:60]
    assert mine.root_node is stored.root_node
    for index in (59, 30, 0):
        assert mine.matches(index, stored.nodes[index])
    assert Payload.compared == 60
    assert mine.matches(60, stored.nodes[60])  # its own block only
    assert Payload.compared == 61
    mine.extend(tokens[:2])
    stored.extend(tokens[:2])
    assert mine.matches(99, stored.nodes[99])
    assert mine.matches(100, stored.nodes[100])
    assert Payload.compared == 61 + 39


def test_a_long_chain_is_compared_and_freed_without_recursion() -> None:
    tokens = np.arange(200_000, dtype=np.int32)
    one, two = keys_of(weak, CacheExtras(), tokens), keys_of(weak, CacheExtras(), tokens)
    assert one.matches(99_999, two.nodes[99_999])
    last = keys_of(weak, CacheExtras("s"), tokens).nodes.pop()
    assert not one.matches(99_999, last)
    del one, two, last


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MultimodalItem("", 0, 1), "item_id"),
        (lambda: MultimodalItem("a", -1, 1), "start -1"),
        (lambda: MultimodalItem("a", 0, 0), "length 0"),
        (lambda: MultimodalItem("a", 0.5, 1), "start 0.5"),
        (lambda: MultimodalItem("a", 2**31 - 1, 2), "2147483648"),
        (lambda: CacheExtras(salt=""), "salt"),
        (lambda: CacheExtras(salt=b"x"), "salt"),
        (lambda: CacheExtras(adapter=("", "path")), "adapter"),
        (lambda: CacheExtras(adapter=("name",)), "adapter"),
        (lambda: CacheExtras(items=[MultimodalItem("a", 0, 1)]), "items"),
    ],
)
def test_extras_that_make_no_sense(make, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BlockHasher(0), "block_size"),
        (lambda: BlockHasher(16, "md5"), "md5"),
        (lambda: BlockHasher(16, hash), "int"),
    ],
)
def test_hashers_that_cannot_work(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "tokens",
    [tokens_of(1, 2), tokens_of(1, 2, 3).astype(np.int64), tokens_of(1, 2, 3)[None], [1, 2, 3]],
    ids=["part of a block", "int64", "two axes", "list"],
)
def test_tokens_that_do_not_fit_change_nothing(tokens) -> None:
    keys = keys_of(BlockHasher(BLOCK), CacheExtras(), tokens_of(1, 2, 3))
    before = keys.digests.copy()
    with pytest.raises(ShapeMismatchError, match="want"):
        keys.extend(tokens)
    assert keys.digests == before


def test_a_digest_that_raises_changes_nothing() -> None:
    calls = []

    def failing(data: bytes) -> bytes:
        calls.append(data)
        if len(calls) > 3:
            raise OSError("broken")
        return data[-1:]

    keys = keys_of(BlockHasher(2, failing), CacheExtras(), tokens_of(1, 2))
    with pytest.raises(OSError, match="broken"):
        keys.extend(tokens_of(3, 4, 5, 6))
    assert len(keys) == len(keys.nodes) == 1
