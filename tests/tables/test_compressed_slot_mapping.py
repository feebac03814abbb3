"""Slots to words and back, against plain Python; shifts; capacities; what it saves."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

import pallas_kernels
import pyagent_kv_jax
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError
from pyagent_kv_jax.tables import CompressedSlotMapping, SlotMapping, compress_slots

T, BLOCK_SIZE, CAPACITY, PADDING = 24, 4, 20, -(2**31)
LARGEST = 2**31 - 2

_compress = jax.jit(partial(compress_slots, block_size=BLOCK_SIZE, capacity=CAPACITY))
_expand = jax.jit(lambda mapping: mapping.expand(T))
_shift = jax.jit(lambda mapping, blocks: mapping.shifted(blocks, within=16))


def words_of(slots: list[int], block_size: int) -> list[int]:
    """The words of ``slots``, one token after another."""
    while slots and slots[-1] == -1:
        slots = slots[:-1]
    follows = [b == a == -1 or (a >= 0 and b == a + 1) for a, b in pairwise(slots)]
    cuts = [0, *(i + 1 for i, f in enumerate(follows) if not f), len(slots)] if slots else []
    words = []
    for start, end in pairwise(cuts):
        first, length = slots[start], end - start
        is_block = length == block_size and first >= 0 and first % block_size == 0
        words += [first // block_size] if is_block else [-length, first + 1]
    return words


def slots_of_words(words: list[int], block_size: int, shift: int = 0, within: int = 2**40) -> list[int]:
    """What each token's slot is, word by word, ``shift`` blocks further on: -1 for what is past the last slot."""
    slots: list[int] = []
    words = [w for w in words if w != PADDING]
    while words:
        word = words.pop(0)
        length = -word if word < 0 else block_size
        first = words.pop(0) - 1 if word < 0 else word * block_size
        inside = first >= 0 and first + length <= within * block_size
        slots += [first + shift * block_size + i if inside else -1 for i in range(length)]
    return slots


def padded(values: list[int], size: int, fill: int) -> np.ndarray:
    return np.array(values + [fill] * (size - len(values)), np.int32)


block = st.integers(0, 9).map(lambda b: list(range(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE)))
run = st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda r: list(range(r[0], r[0] + r[1])))
nowhere = st.integers(1, 5).map(lambda n: [-1] * n)
garbage = st.lists(st.one_of(st.integers(-1, 12), st.sampled_from([LARGEST, LARGEST - 1, 2**30])), max_size=8)
descending = run.map(lambda r: r[::-1])
any_slots = st.lists(st.one_of(block, block, run, nowhere, garbage, descending), max_size=8).map(
    lambda parts: [slot for part in parts for slot in part][:T]
)


@settings(max_examples=300, deadline=None)
@given(any_slots)
def test_round_trip_in_the_fewest_words(slots: list[int]) -> None:
    array, words = padded(slots, T, -1), words_of(slots, BLOCK_SIZE)
    mapping, ok = _compress(array)
    assert ok == (len(words) <= CAPACITY)
    if not ok:
        assert mapping.words.tolist() == [PADDING] * CAPACITY
        assert _expand(mapping).tolist() == [-1] * T
        return
    assert mapping.words.tolist() == padded(words, CAPACITY, PADDING).tolist()
    assert _expand(mapping).tolist() == array.tolist()


words_list = st.lists(
    st.one_of(
        st.integers(0, 20).map(lambda b: [b]),
        st.tuples(st.integers(1, 6), st.integers(0, 80)).map(lambda r: [-r[0], r[1]]),
    ),
    max_size=CAPACITY // 2,
).map(lambda parts: [word for part in parts for word in part])


@settings(max_examples=150, deadline=None)
@given(words_list, st.integers(0, 3))
def test_every_stream_of_words_is_read_and_shifted_as_plain_python_does(words: list[int], blocks: int) -> None:
    """Also those that no compression makes: runs that could be one, empty blocks side by side."""
    mapping = CompressedSlotMapping(jnp.asarray(padded(words, CAPACITY, PADDING)), BLOCK_SIZE)
    slots = slots_of_words(words, BLOCK_SIZE)
    assert _expand(mapping).tolist() == padded(slots[:T], T, -1).tolist()
    moved = np.array(_expand(_shift(mapping, blocks)))
    moved[moved > 1000] = -1  # outside every pool
    assert moved.tolist() == padded(slots_of_words(words, BLOCK_SIZE, blocks, within=16)[:T], T, -1).tolist()


def test_numbers_of_words_and_tokens_and_runs() -> None:
    mapping, _ = compress_slots(np.array([8, 9, 10, 11, -1, -1, 5, -1], np.int32), BLOCK_SIZE, 8)
    assert mapping.words.tolist() == [2, -2, 0, -1, 6, PADDING, PADDING, PADDING]
    assert (int(mapping.num_words), int(mapping.num_tokens), mapping.capacity) == (5, 7, 8)
    runs = mapping.as_runs()
    assert runs[runs[:, 2] > 0].tolist() == [[8, 0, 4], [-1, 4, 2], [5, 6, 1]]


def test_numbers_that_overflow_name_nothing_that_is_there() -> None:
    """A block whose slots, a run whose length, a shift whose sum would wrap round to something else."""
    words = jnp.array([2**31 - 1, 2**29, -16, LARGEST, PADDING], jnp.int32)
    mapping = CompressedSlotMapping(words, BLOCK_SIZE)
    for moved in (mapping, *(mapping.shifted(blocks) for blocks in (1, 2**31 - 1, -(2**31), -(2**29) + 1))):
        assert min(_expand(moved).tolist()) >= LARGEST - 1
    last = dataclasses.replace(mapping, words=jnp.array([-1, LARGEST], jnp.int32))
    assert last.shifted(-(2**31)).expand(1).tolist() == [LARGEST]
    long = dataclasses.replace(mapping, words=jnp.array([-(2**31 - 1), 1, -(2**31 - 1), 1, 3], jnp.int32))
    assert _expand(long).tolist() == [-1] * T
    assert int(long.num_tokens) == 0
    backward = dataclasses.replace(mapping, words=jnp.array([3, -2, 5, PADDING], jnp.int32)).shifted(-2)
    assert backward.expand(6).tolist()[:4] == [4, 5, 6, 7]
    assert min(backward.expand(6).tolist()[4:]) >= LARGEST


def test_a_prefill_of_scattered_blocks_takes_a_fifteenth_of_the_bytes() -> None:
    blocks = np.random.default_rng(0).permutation(4096)[:53].astype(np.int32)
    slots = (blocks[:, None] * 16 + np.arange(16, dtype=np.int32)).ravel()[:844]
    mapping, ok = SlotMapping(jnp.asarray(slots)).compress(16)
    assert ok
    assert mapping.expand(844).tolist() == slots.tolist()
    assert int(mapping.num_words) == 54
    assert slots.nbytes / (4 * int(mapping.num_words)) > 15
    assert slots.nbytes / mapping.words.nbytes > 13  # rounded up to 64 words
    padded_step = np.append(slots, np.full(1024 - 844, -1, np.int32))  # as a step brings it
    assert padded_step.nbytes / SlotMapping(jnp.asarray(padded_step)).compress(16)[0].words.nbytes == 16


def test_no_tokens_and_no_words() -> None:
    nothing, ok = compress_slots(np.zeros(0, np.int32), BLOCK_SIZE)
    assert ok
    assert nothing.capacity == 1
    assert nothing.expand(0).shape == (0,)
    empty, ok = compress_slots(np.full(3, -1, np.int32), BLOCK_SIZE, 0)
    assert ok
    assert empty.expand(3).tolist() == [-1] * 3
    assert empty.shifted(2).as_runs().shape == (0, 3)
    assert int(empty.num_tokens) == 0


@pytest.mark.parametrize(
    ("slots", "how", "error", "message"),
    [
        ([0, 2, 4], {"capacity": 5}, ShapeMismatchError, "capacity: got 5 words, want the 6"),
        ([0, -2], {}, InvalidArgumentError, "slots: got -2 to 0, want -1 or 0"),
        ([0, 2**31 - 1], {}, InvalidArgumentError, "slots: got 0 to 2147483647"),
        ([0.5], {}, ShapeMismatchError, r"slots: got float64\[1\], want int32\[tokens\]"),
        ([0], {"block_size": 0}, InvalidArgumentError, "block_size: got 0"),
        ([0], {"capacity": -1}, InvalidArgumentError, "capacity: got -1"),
        ([0], {"capacity": 1.0}, InvalidArgumentError, "capacity: got 1.0"),
    ],
)
def test_what_cannot_be_compressed(slots, how, error, message) -> None:
    with pytest.raises(error, match=message):
        compress_slots(np.array(slots, None if slots == [0.5] else np.int32), **{"block_size": BLOCK_SIZE, **how})


def test_traced_a_bad_slot_leaves_nothing_and_no_capacity_is_an_error() -> None:
    mapping, ok = _compress(np.append(np.arange(T - 1, dtype=np.int32), np.int32(-2)))
    assert not ok
    assert mapping.words.tolist() == [PADDING] * CAPACITY
    with pytest.raises(InvalidArgumentError, match="capacity: got None for traced slots"):
        jax.jit(lambda slots: compress_slots(slots, BLOCK_SIZE)[0].words)(np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([5] * 7, "words of 28 tokens, want 24 at most"),
        ([5, -3], "header with no payload"),
        ([-3, -1, 0, 2], "header with no payload"),
        ([PADDING, 1], "words after padding"),
    ],
)
def test_checking_mode_reports(words: list[int], message: str) -> None:
    checked = checkify.checkify(_expand, errors=checkify.user_checks)
    with pallas_kernels.checking():
        right = CompressedSlotMapping(jnp.array([*range(6), PADDING], jnp.int32)[: len(words)], BLOCK_SIZE)
        assert checked(right)[0].get() is None
        error, _ = checked(CompressedSlotMapping(jnp.array(words, jnp.int32), BLOCK_SIZE))
    assert message in error.get()


def test_one_class_in_every_place_it_is_imported_from() -> None:
    assert pallas_kernels.CompressedSlotMapping is pyagent_kv_jax.CompressedSlotMapping is CompressedSlotMapping


@pytest.mark.parametrize(
    ("slots", "sizes", "message"),
    [
        (np.zeros(3), (4, 2), r"slots: got float64\[3\], want int32\[tokens\]"),
        (np.zeros((3, 1), np.int32), (4, 2), r"slots: got int32\[3, 1\]"),
        (np.zeros(3, np.int32), (0, 2), "block_size: got 0"),
        (np.zeros(3, np.int32), (4, -1), "capacity: got -1"),
    ],
)
def test_the_kernels_own_function_refuses_them_too(slots, sizes, message) -> None:
    with pytest.raises(pallas_kernels.ArgumentError, match=message):
        pallas_kernels.compress_slots(slots, *sizes)
