"""The Mosaic TPU forms of gather, copy, write and merge, interpreted, on the whole of the shared tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_attention_states, mosaic_tpu, paged_copy, paged_gather, paged_write
from pallas_kernels.merge_attention_states import mosaic_tpu as merge
from pallas_kernels.paged_copy import mosaic_tpu as copy
from pallas_kernels.paged_gather import mosaic_tpu as gather
from pallas_kernels.paged_write import mosaic_tpu as write
from tests.pallas_kernels import merge_cases, page_cases, write_cases
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.mosaic_checks import check_copy, check_gather, check_merge, check_write, interpreted
from tests.pallas_kernels.page_cases import CopyCase, GatherCase
from tests.pallas_kernels.write_cases import WriteCase

# TPUs have no arithmetic in float16, and no vectors of it.
GATHERS = [case for case in page_cases.GATHER_CASES if case.dtype != "float16"]
COPIES = [case for case in page_cases.COPY_CASES if case.dtype != "float16"]
WRITES = [case for case in write_cases.CASES if "float16" not in (case.dtype, case.kv_dtype)]
MERGES = [case for case in merge_cases.CASES if case.dtype != "float16"]
MORE_WRITES = [
    # More tokens than FEW_TOKENS, so that strips are longer than a tile; several tokens of a tile in any order.
    WriteCase("long-strips", slots=None, runs=((100, 0, 300), (450, 300, 300)), num_tokens=600, block_size=128),
    WriteCase("one-strip-many-runs", slots=(37, 33, 35, 34, 47, 32, 40), num_tokens=7, block_size=16),
    WriteCase("two-strips-of-a-page", slots=(9, 40, 10, 41, 8), num_tokens=5, block_size=32, kv_dtype="bfloat16"),
    WriteCase("runs-across-strips", slots=None, runs=((10, 30, 40), (80, 5, 25)), num_tokens=70, block_size=32),
]
MORE_COPIES = [
    # More pairs than copies in flight at a time.
    CopyCase("many-pairs-apart", (0, 1, 1, 0, 2, 2, 1) * 4, (-1, 3, 4, 5, -1, 6, 7) * 4),
    CopyCase("many-pairs-chained", (*range(8),) * 3, (*range(1, 9), *(-1,) * 16)),
]
MORE_GATHERS = [GatherCase("many-ids", (3, -1, 8, 0, 5) * 9)]


SEVERAL_PIECES = {
    "gather": GatherCase("several-pieces", (3, -1, 8, 0, 5, 2, 1) * 3),
    "copy": CopyCase("several-pieces", (5, 1, 1, 0, 2, 2, 1, 4, 6) * 2, (-1, 3, 4, 8, -1, 6, 7, 0, 5) * 2),
    "copy-chained": CopyCase("several-pieces-chained", (*range(8), *range(8), 8), (*range(1, 9), *(-1,) * 8, 0)),
    "write": WriteCase("several-calls", slots=(17, -1, 13, 5, 15, 14, 20, 7, 22, 2, 0, 11), num_tokens=12),
    "write-padding": WriteCase("several-calls-of-padding", slots=(17, *(-1,) * 12), num_tokens=13),
}


@pytest.mark.parametrize("name", list(SEVERAL_PIECES))
def test_lists_longer_than_what_has_room_in_scalar_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_tpu, "IDS_A_PIECE", 4)
    monkeypatch.setattr(write, "MAX_RUNS", 3)
    _forget()  # programs for lists as long, in one piece
    case = SEVERAL_PIECES[name]
    if isinstance(case, GatherCase):
        check_gather(gather.paged_gather, case)
    elif isinstance(case, CopyCase):
        check_copy(copy.paged_copy, case)
    else:
        check_write(write.paged_write, case)
    _forget()


def _forget() -> None:
    for traced in (gather._gather, copy._copy, write._write):
        traced.clear_cache()


@pytest.mark.parametrize("case", GATHERS + MORE_GATHERS, ids=lambda case: case.name)
def test_gather(case: GatherCase) -> None:
    check_gather(gather.paged_gather, case)


@pytest.mark.parametrize("case", COPIES + MORE_COPIES, ids=lambda case: case.name)
def test_copy(case: CopyCase) -> None:
    check_copy(copy.paged_copy, case)


@pytest.mark.parametrize("case", WRITES + MORE_WRITES, ids=lambda case: case.name)
def test_write(case: WriteCase) -> None:
    check_write(write.paged_write, case)


@pytest.mark.parametrize("case", MERGES, ids=lambda case: case.name)
def test_merge(case: MergeCase) -> None:
    check_merge(merge.merge_attention_states, case)


def test_copies_that_land_on_one_page_leave_one_of_them_whole() -> None:
    pages = np.random.default_rng(0).standard_normal((6, 1, 8, 8)).astype(np.float32)
    with interpreted():
        copied = np.asarray(copy.paged_copy(pages, np.array([0, 1, 2], np.int32), np.array([5, 5, 5], np.int32)))
    assert any((copied[5] == pages[i]).all() for i in range(3))
    np.testing.assert_array_equal(copied[:5], pages[:5])


def _calls() -> dict[str, Callable[..., Any]]:
    pages, ids = jnp.zeros((2, 1, 16, 64)), jnp.zeros(1, jnp.int32)
    token = jnp.zeros((1, 1, 64))
    return {
        "gather": partial(paged_gather, pages, ids),
        "copy": partial(paged_copy, pages, ids, ids),
        "write": partial(paged_write, pages, pages, token, token, ids),
        "merge": partial(merge_attention_states, token[None], token[None, ..., 0]),
    }


@pytest.mark.parametrize("name", list(_calls()))
def test_each_is_found_by_name_and_says_why_not(name: str) -> None:
    call = _calls()[name]
    with pytest.raises(NotImplementedError, match="Mosaic TPU kernels run on a TPU, and this is for a cpu"):
        call(implementation="mosaic_tpu")
    with interpreted():
        mosaic, xla = call(implementation="mosaic_tpu"), call(implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, mosaic, xla)


def test_float16_is_refused_with_the_reason() -> None:
    moved = GatherCase("float16", (1,), "float16"), CopyCase("float16", (1,), (2,), "float16")
    with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
        check_gather(gather.paged_gather, moved[0])
    with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
        check_copy(copy.paged_copy, moved[1])
    written = next(case for case in write_cases.CASES if case.kv_dtype == "float16")
    merged = next(case for case in merge_cases.CASES if case.dtype == "float16")
    with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
        check_write(write.paged_write, written)
    with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
        check_merge(merge.merge_attention_states, merged)
