"""The loops of the XLA form end where the real work ends: counted, since a mask would hide a step too many."""

from __future__ import annotations

import chex
import numpy as np
import pytest

from pallas_kernels.paged_attention.context_parallel import WHOLE_CONTEXT, ContextParallel
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables

LOC = np.array([0, 5, 5, 6, 76, 76, 76], np.int32)
KV_LENS = np.array([5, 0, 33, 100, 0, 0], np.int32)


def _columns(
    visibility: Visibility, first: int, last: int, kv_len: int, tables: Tables, sequence: int = 0
) -> list[int]:
    start, end = visibility.interval(np.array([first, last], np.int32), np.int32(kv_len))
    return [int(x) for x in tables.needed_columns(np.int32(sequence), start[0], end[-1])]


def _tables(
    width: int = 64, positions: object = None, context: ContextParallel = WHOLE_CONTEXT, **kwargs: object
) -> Tables:
    blocks = np.arange(width, dtype=np.int32)[None]
    return Tables.create(
        kwargs.get("blocks", blocks),
        positions,
        step=4,
        num_pages=1000,
        block_size=8,
        context=context,  # type: ignore[arg-type]
    )


def test_as_many_items_as_there_are_tiles() -> None:
    sequences = Sequences.create(LOC, KV_LENS, 90)
    assert int(sequences.items(16, fewest=1).total) == 1 + 1 + 5
    assert int(sequences.items(16, fewest=2).total) == 1 + 5
    assert int(sequences.items(1, fewest=1, most=1).total) == 1
    assert int(Sequences.create(None, KV_LENS, 6).items(1, fewest=1).total) == 6


def test_items_are_tiles_of_sequences() -> None:
    items = Sequences.create(LOC, KV_LENS, 90).items(16, fewest=1)
    got = [tuple(int(x) for x in items.get(np.int32(i))) for i in range(7)]
    assert got == [
        (0, 0, 5, 0, 5),
        (2, 5, 1, 32, 33),
        (3, 6, 16, 30, 100),
        (3, 22, 16, 46, 100),
        (3, 38, 16, 62, 100),
        (3, 54, 16, 78, 100),
        (3, 70, 6, 94, 100),
    ]


@pytest.mark.parametrize(
    ("visibility", "columns"),
    [
        (Visibility(True, None, None), [0, 6]),  # positions 0 to 47: keys after the tile are never visited
        (Visibility(False, None, None), [0, 13]),
        (Visibility(True, np.int32(10), None), [2, 6]),  # 32 - 9 = 23 is in column 2
        (Visibility(True, np.int32(8), None), [3, 6]),
        (Visibility(False, np.int32(8), None), [3, 13]),
        (Visibility(True, None, np.int32(24)), [3, 6]),
        (Visibility(False, None, np.int32(24)), [3, 6]),
    ],
)
def test_columns_of_a_tile(visibility: Visibility, columns: list[int]) -> None:
    """Queries at 32 to 47 of 100, blocks of 8."""
    assert _columns(visibility, 32, 47, 100, _tables()) == columns


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_visited_for_negative_positions(causal: bool) -> None:
    first, last = _columns(Visibility(causal, None, None), -9, -1, 100, _tables())
    assert first == last


def test_columns_under_context_parallel_are_those_of_the_share() -> None:
    """Of 48 tokens in turns of 4 x 2, rank 1 holds 2 .. 3, 10 .. 11, ...: 12 tokens, 2 blocks."""
    tables = _tables(context=ContextParallel(4, 1, 2))
    assert _columns(Visibility(True, None, None), 32, 47, 100, tables) == [0, 2]
    nothing = _tables(context=ContextParallel(4, 3, 2))
    first, last = _columns(Visibility(True, np.int32(2), None), 33, 33, 100, nothing)
    assert first == last


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 2, 5, 16])
def test_a_share_of_the_context_is_dealt_out_in_turns(size: int, interleave: int) -> None:
    """Lengths and positions of every rank, against dealing out the tokens one by one."""
    for rank in range(size):
        context = ContextParallel(size, rank, interleave)
        held = [x for x in range(200) if (x // interleave) % size == rank]
        chex.assert_trees_all_equal(np.asarray(context.position(np.arange(len(held)))), np.array(held))
        counts = np.array([sum(x < length for x in held) for length in range(201)])
        chex.assert_trees_all_equal(np.asarray(context.local_length(np.arange(201))), counts)


def test_columns_in_any_order() -> None:
    """Columns 2 and 5 hold what the tile sees; the hole, the unused and the far ones do not widen the range."""
    positions = np.array([[0, 8, 40, 16, -1, 32, 24, 48]], np.int32)
    blocks = np.array([[1, 2, 3, 4, 5, 6, -1, 8]], np.int32)
    tables = _tables(positions=positions, blocks=blocks)
    assert _columns(Visibility(True, np.int32(9), None), 39, 47, 100, tables) == [2, 6]
    assert _columns(Visibility(True, np.int32(1), None), 70, 70, 100, tables)[0] >= 8
