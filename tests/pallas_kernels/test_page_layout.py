"""Our pages in the layouts of others, element by element, and back."""

from __future__ import annotations

import chex
import numpy as np
import pytest

from pallas_kernels import (
    ArgumentError,
    from_heads_first,
    from_interleaved,
    from_nhd,
    to_heads_first,
    to_interleaved,
    to_nhd,
)

PAGES = np.random.default_rng(0).standard_normal((5, 3, 4, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("there", "back", "place"),
    [
        (to_heads_first, from_heads_first, lambda page, head, offset: (head, page, offset)),
        (to_nhd, from_nhd, lambda page, head, offset: (page, offset, head)),
    ],
)
def test_one_array(there, back, place) -> None:  # type: ignore[no-untyped-def]
    theirs = np.asarray(there(PAGES))
    for page, head, offset in np.ndindex(*PAGES.shape[:3]):
        chex.assert_trees_all_equal(theirs[place(page, head, offset)], PAGES[page, head, offset])
    chex.assert_trees_all_equal(np.asarray(back(theirs)), PAGES)


def test_interleaved() -> None:
    theirs = np.asarray(to_interleaved(PAGES, -PAGES))
    for page, head, offset in np.ndindex(*PAGES.shape[:3]):
        chex.assert_trees_all_equal(theirs[page, offset, 2 * head], PAGES[page, head, offset])
        chex.assert_trees_all_equal(theirs[page, offset, 2 * head + 1], -PAGES[page, head, offset])
    chex.assert_trees_all_equal(tuple(map(np.asarray, from_interleaved(theirs))), (PAGES, -PAGES))


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_heads_first(PAGES[0]),
        lambda: from_heads_first(PAGES[0]),
        lambda: to_nhd(PAGES[0]),
        lambda: from_nhd(PAGES[0]),
        lambda: to_interleaved(PAGES, PAGES[:2]),
        lambda: to_interleaved(PAGES, PAGES.astype(np.float16)),
        lambda: from_interleaved(PAGES[:, :, :3]),
        lambda: to_nhd([1, 2]),
    ],
)
def test_bad_arguments(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=r"got .*, want"):
        call()
