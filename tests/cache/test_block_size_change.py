"""Tables over blocks of another size name the same content, position by position; nothing is lost and nothing leaks."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax import (
    ConfigError,
    InvalidBlockError,
    KVCacheConfig,
    OutOfBlocksError,
    PagedKVCache,
    RequestTooLongError,
)
from pyagent_kv_jax.cache.block_size_change import BlockSizeChange, change_block_size

PAGE, PAGES, MOST_TOKENS = 4, 61, 96
SIZES = (4, 8, 12, 16, 24, 32)


@dataclasses.dataclass
class State:
    """Rows of ``groups`` layer groups over blocks of ``size``, and what stands in every slot of the pages."""

    size: int
    groups: int
    tables: np.ndarray
    num_tokens: np.ndarray
    references: np.ndarray
    memory: np.ndarray

    @property
    def num_blocks(self) -> int:
        return PAGES * PAGE // self.size

    def content(self, row: int) -> list[int | None]:
        """What the row reads at each position; None where it holds nothing."""
        blocks = [int(self.tables[row, at // self.size]) for at in range(int(self.num_tokens[row]))]
        return [
            None if block < 0 else int(self.memory[block * self.size + at % self.size])
            for at, block in enumerate(blocks)
        ]

    def is_open(self, row: int) -> bool:
        return bool(self.num_tokens[row] % self.size)

    def last_block(self, row: int) -> int:
        return int(self.tables[row, (self.num_tokens[row] - 1) // self.size])

    def change(self, size: int) -> tuple[BlockSizeChange, State]:
        change = change_block_size(
            self.tables,
            self.num_tokens,
            self.references,
            old_size=self.size,
            new_size=size,
            page_size=PAGE,
            num_blocks=PAGES * PAGE // size,
            width=-(-MOST_TOKENS // size),
            num_groups=self.groups,
        )
        pages = self.memory.copy().reshape(PAGES, PAGE)
        pages[change.vacant] = -1
        pages[change.copy_dst] = self.memory.reshape(PAGES, PAGE)[change.copy_src]
        after = State(size, self.groups, change.tables, self.num_tokens, change.ref_counts, pages.ravel())
        return change, after


def random_state(rng: np.random.Generator, size: int, groups: int) -> State:
    """Rows that share prefixes or everything, windows that let go of their first columns, columns reserved ahead."""
    requests, blocks = int(rng.integers(1, 6)), PAGES * PAGE // size
    width = -(-MOST_TOKENS // size)
    tables, lengths = np.full((groups, requests, width), -1, np.int32), np.zeros(requests, np.int64)
    free = rng.permutation(blocks).tolist()
    if rng.random() < 0.5:
        free.sort(reverse=True)  # blocks come in runs
    for request in range(requests):
        tokens, other = int(rng.integers(0, MOST_TOKENS // 2)), int(rng.integers(0, request + 1))
        kind, shared = rng.random(), 0
        if request and kind < 0.3:  # a fork
            tokens, shared = int(lengths[other]), -(-int(lengths[other]) // size)
        elif request and kind < 0.6:  # a cached prefix
            shared = min(tokens, int(lengths[other])) // size
        columns = -(-tokens // size) + (int(rng.integers(0, 2)) if kind >= 0.3 else 0)
        columns = min(columns, width)
        if groups * (columns - shared) > len(free):
            continue
        lengths[request] = tokens
        tables[:, request, :shared] = tables[:, other, :shared]
        for column in range(shared, columns):
            for group in range(groups):
                tables[group, request, column] = free.pop()
    for request in range(requests):  # the last group is one with a window
        if groups > 1 or rng.random() < 0.3:
            tables[-1, request, : int(rng.integers(0, lengths[request] // size + 1))] = -1
    tables = tables.reshape(groups * requests, width)
    references = np.bincount(tables[tables >= 0], minlength=blocks).astype(np.int32)
    memory = rng.permutation(PAGES * PAGE) + 1000
    return State(size, groups, tables, np.tile(lengths, groups), references, memory)


def blocks_wanted(state: State, size: int) -> int:
    """How many new blocks there must be: one for each different string of old units, counted in plain Python."""
    unit, requests, wanted = math.gcd(state.size, size), len(state.tables) // state.groups, set()

    def units_of(row: int, column: int) -> tuple:
        last = min((column + 1) * size, int(state.num_tokens[row]))
        ats = range(column * size, last, unit)
        blocks = [int(state.tables[row, at // state.size]) for at in ats]
        return tuple((b, at % state.size) if b >= 0 else None for b, at in zip(blocks, ats, strict=True))

    for request in range(requests):
        tokens = int(state.num_tokens[request])
        for column in range(-(-tokens // size)):
            units = [units_of(group * requests + request, column) for group in range(state.groups)]
            is_there = [any(u is not None for u in each) for each in units]
            if (column + 1) * size > tokens:  # open: shared with whoever shares it in every group, or with nobody
                alone = not state.is_open(request) or not any(is_there)
                wanted |= {(group, request if alone else tuple(units)) for group in range(state.groups)}
            else:
                wanted |= {each for each, there in zip(units, is_there, strict=True) if there}
    return len(wanted)


def check_change(before: State, change: BlockSizeChange, after: State) -> None:
    requests = len(before.tables) // before.groups
    for row in range(len(before.tables)):
        now, then = after.content(row), before.content(row)
        assert [x if y is not None else None for x, y in zip(now, then, strict=True)] == then
        columns = -(-int(before.num_tokens[row]) // after.size)
        assert change.num_blocks[row] == columns
        assert (change.tables[row, columns:] == -1).all()
        assert (change.tables[row, : change.released[row]] == -1).all()
        assert (change.tables[row, change.released[row] : columns] >= 0).all()
        if after.is_open(row):
            assert after.last_block(row) >= 0  # the next token has a slot
    named = change.tables[change.tables >= 0]
    np.testing.assert_array_equal(change.ref_counts, np.bincount(named, minlength=after.num_blocks))
    assert len(change.ref_counts) == after.num_blocks
    groups_of = {b: {r // requests for r in range(len(change.tables)) if b in change.tables[r]} for b in named.tolist()}
    assert all(len(groups) == 1 for groups in groups_of.values())
    for a in range(requests):
        for b in range(a):
            rows = [(g * requests + a, g * requests + b) for g in range(before.groups)]
            if not after.is_open(a) or not after.is_open(b):
                continue
            shared = [after.last_block(one) == after.last_block(two) for one, two in rows]
            assert all(shared) or not any(shared)  # or one would write into what only the other was copied
            if all(shared):
                assert before.is_open(a)
                assert all(before.last_block(one) == before.last_block(two) for one, two in rows)
    if before.size % after.size == 0:
        assert not len(change.copy_src)
    assert len(set(change.copy_dst.tolist())) == len(change.copy_dst)
    assert not (change.copy_src == change.copy_dst).any()
    read = {int(p) for p in after.memory if p < 0}
    assert read <= {-1}


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from(SIZES),
    changes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=5),
    groups=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_any_changes_keep_all_content(seed: int, size: int, changes: list[int], groups: int) -> None:
    state = random_state(np.random.default_rng(seed), size, groups)
    for new_size in changes:
        kept = [x.copy() for x in (state.tables, state.num_tokens, state.references)]
        wanted, there = blocks_wanted(state, new_size), PAGES * PAGE // new_size
        if wanted > there:
            with pytest.raises(OutOfBlocksError, match=rf"takes {wanted} of {new_size}, want at most the {there} "):
                state.change(new_size)
            after = state
        else:
            change, after = state.change(new_size)
            assert (change.ref_counts > 0).sum() == wanted
            check_change(state, change, after)
        for now, then in zip((state.tables, state.num_tokens, state.references), kept, strict=True):
            np.testing.assert_array_equal(now, then)
        state = after


def changed(tables: list[list[int]], tokens: list[int], old: int, new: int, **options: int) -> BlockSizeChange:
    rows = np.array(tables, np.int32)
    sizes = {"page_size": 4, "num_blocks": 64 // new, "width": -(-64 // new)} | options
    references = np.bincount(rows[rows >= 0], minlength=64 // old)
    return change_block_size(rows, np.array(tokens), references, old_size=old, new_size=new, **sizes)


def test_runs_stay_and_the_rest_is_copied_at_once() -> None:
    change = changed([[3, 2, 6, 7, 9, -1]], [35], 8, 16, num_blocks=4)
    assert change.tables.tolist() == [[1, 3, 0, -1]] or change.tables[0, 1] == 3
    assert not set(change.copy_dst.tolist()) & {12, 13, 14, 15}  # 6 and 7 are a run
    assert len(change.copy_src) % 2 == 0


def test_of_two_that_claim_a_run_the_longer_stays() -> None:
    change = changed([[4, 5, 1], [4, 5, 6]], [20, 24], 8, 32, num_blocks=2)
    assert change.tables[1, 0] == 1
    assert change.tables[0, 0] == 0
    np.testing.assert_array_equal(change.copy_src, [8, 9, 10, 11, 2, 3])
    np.testing.assert_array_equal(change.copy_dst, [0, 1, 2, 3, 4, 5])


def test_a_block_most_of_which_is_in_place_stays_there() -> None:
    change = changed([[4, 5, 6, 1]], [16], 4, 16)
    assert change.tables[0, 0] == 1
    assert (change.copy_src.tolist(), change.copy_dst.tolist()) == ([1], [7])


def test_full_blocks_are_shared_on_and_what_becomes_open_is_not() -> None:
    both = changed([[0, 1, 2], [0, 1, 2]], [24, 24], 8, 16)
    assert both.tables[0, 0] == both.tables[1, 0]
    assert both.tables[0, 1] != both.tables[1, 1]
    forked = changed([[0, 1, 2], [0, 1, 2]], [23, 23], 8, 16)
    assert (forked.tables[0] == forked.tables[1]).all()


def test_what_a_window_let_go_of_is_vacant() -> None:
    change = changed([[-1, 1, 2]], [24], 8, 16)
    assert change.released.tolist() == [0]
    assert change.tables[0, :2].tolist() == [0, 1]
    assert set(change.vacant.tolist()) == {0, 1, 6, 7}
    emptied = changed([[-1, -1]], [8], 4, 16)
    assert emptied.tables[0, 0] >= 0  # the next token's place
    assert emptied.released.tolist() == [0]
    assert changed([[-1, -1]], [8], 4, 8).released.tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0]], [4], 4, 6), {}, ConfigError, "got 6, want a positive multiple of the page size 4"),
        (([[0]], [4], 4, 2), {}, ConfigError, "got 2, want"),
        (([[0, 1, 2]], [12], 4, 8), {"num_blocks": 1}, OutOfBlocksError, "3 blocks of 4 .* takes 2 of 8, .* the 1 "),
        (([[0, 1, 2]], [12], 4, 8), {"width": 1}, RequestTooLongError, "row 0: holds 12 tokens, want at most the 8 "),
        (([[0], [1]], [4, 9], 4, 8), {}, RequestTooLongError, "row 1: holds 9 tokens, want at most the 4 "),
    ],
)
def test_what_cannot_be(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        changed(*arguments, **options)


def test_references_that_no_row_holds_are_no_loss() -> None:
    sizes = {"old_size": 4, "new_size": 8, "page_size": 4, "num_blocks": 2, "width": 4}
    with pytest.raises(InvalidBlockError, match=r"blocks \[0, 2\]: got \[2, 1\] references, want \[1, 0\]"):
        change_block_size(np.array([[0, 1]]), np.array([8]), np.array([2, 1, 1, 0]), **sizes)


CONFIG = KVCacheConfig(
    num_layers=2, num_heads=2, head_dim=4, num_blocks=14, block_size=8, max_num_reqs=3, max_model_len=64,
    kernel_block_size=4,
)  # fmt: skip


def held(cache: PagedKVCache, row: int) -> np.ndarray:
    """[K or V, layers, tokens, heads, dim] of a row, read slot by slot."""
    pages, size = cache.pages, cache.config.block_size
    blocks, position = np.asarray(cache.table.blocks)[row], np.arange(int(cache.table.num_tokens[row]))
    page, offset = np.divmod(blocks[position // size] * size + position % size, 4)
    both = np.stack([np.asarray(x).reshape(2, 28, 2, 4, 4) for x in (pages.k_pages, pages.v_pages)])
    return both[:, :, page, :, offset]


def test_a_cache_reads_the_same_through_any_size() -> None:
    cache, rng = PagedKVCache.create(CONFIG), np.random.default_rng(0)
    cache = dataclasses.replace(
        cache, pages=jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), cache.pages)
    )
    shape = cache.pages.k_pages.shape
    for row, tokens in [(0, 20), (1, 17), (0, 14), (2, 3)]:
        cache = cache.extend_allocation(row, tokens)
    want = [held(cache, row) for row in range(3)]
    for size in (16, 4, 24, 8):
        before = cache
        cache = cache.with_block_size(size)
        assert cache.config.block_size == size
        assert cache.config.pool_blocks == 28 * 4 // size
        assert cache.pages.k_pages.shape == shape
        for row in range(3):
            np.testing.assert_array_equal(held(cache, row), want[row])
        assert cache.get_num_free_blocks() == cache.config.pool_blocks - sum(-(-n // size) for n in (34, 17, 3))
        assert before.pages.k_pages.is_deleted() == (size in (16, 24))  # smaller ones need no copy
    cache.check_invariants()
    assert cache.config == CONFIG
    assert cache.with_block_size(8) is cache
    with pytest.raises(OutOfBlocksError, match=r"takes 4 of 32, want at most the 3"):
        cache.with_block_size(32)
    with pytest.raises(ConfigError, match=r"got 4, want a divisor of block_size 6"):
        cache.with_block_size(6)
