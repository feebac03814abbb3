"""``paged_copy`` and ``paged_gather``, bit by bit, in every form."""

from __future__ import annotations

import zlib
from typing import Any

import chex
import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import paged_copy, paged_gather
from tests.pallas_kernels import numpy_reference
from tests.pallas_kernels.implementations import IMPLEMENTATIONS
from tests.pallas_kernels.page_cases import COPY_CASES, GATHER_CASES, NUM_PAGES, CopyCase, GatherCase
from tests.pallas_kernels.stored_numbers import bits, logical, random_bits


def _pages(case: CopyCase | GatherCase) -> NDArray[Any]:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return random_bits(rng, (NUM_PAGES, *case.shape), logical(case.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", COPY_CASES, ids=lambda case: case.name)
def test_copy(case: CopyCase, implementation: str) -> None:
    pages, src, dst = _pages(case), np.array(case.src, np.int32), np.array(case.dst, np.int32)
    copied = paged_copy(pages, src, dst, implementation=implementation)
    assert copied.dtype == pages.dtype
    chex.assert_trees_all_equal(bits(copied), numpy_reference.paged_copy(bits(pages), src, dst))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_copy_of_a_tree_of_pages(implementation: str) -> None:
    """K and V of other shapes and dtypes move alike."""
    rng = np.random.default_rng(0)
    tree = {
        "k": rng.standard_normal((NUM_PAGES, 2, 4, 8)).astype(np.float32),
        "v": [rng.integers(0, 255, (NUM_PAGES, 1, 4, 3), dtype=np.uint8)],
    }
    src, dst = np.array([0, 1, 8], np.int32), np.array([1, 0, -1], np.int32)
    copied = paged_copy(tree, src, dst, implementation=implementation)
    chex.assert_trees_all_equal(copied, jax.tree.map(lambda x: numpy_reference.paged_copy(x, src, dst), tree))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", GATHER_CASES, ids=lambda case: case.name)
def test_gather(case: GatherCase, implementation: str) -> None:
    pages, ids = _pages(case), np.array(case.ids, np.int32)
    gathered = paged_gather(pages, ids, implementation=implementation)
    assert gathered.dtype == pages.dtype
    chex.assert_trees_all_equal(bits(gathered), numpy_reference.paged_gather(bits(pages), ids))
