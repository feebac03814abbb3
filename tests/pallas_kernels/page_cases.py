"""The tables of cases of ``paged_copy`` and ``paged_gather``: which pages, of a pool of ``NUM_PAGES``."""

from __future__ import annotations

import dataclasses

NUM_PAGES = 9


@dataclasses.dataclass(frozen=True)
class CopyCase:
    """Pairs of pages, and what the pages are."""

    name: str
    src: tuple[int, ...]
    dst: tuple[int, ...]
    dtype: str = "float32"
    shape: tuple[int, int, int] = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class GatherCase:
    """Ids of pages, and what the pages are."""

    name: str
    ids: tuple[int, ...]
    dtype: str = "float32"
    shape: tuple[int, int, int] = (2, 4, 8)


_PERMUTATION = (3, 8, 0, 1, 2, 7, 4, 5, 6)
_DTYPES = ("float32", "bfloat16", "float16", "uint16", "uint8", "int8", "float8_e4m3fn", "float8_e5m2")

COPY_CASES = [
    CopyCase("one", (3,), (5,)),
    CopyCase("none", (), ()),
    CopyCase("onto-itself", (4,), (4,)),
    CopyCase("swap", (1, 2), (2, 1)),
    CopyCase("chain-forward", (0, 1, 2, 3), (1, 2, 3, 4)),
    CopyCase("chain-backward", (4, 3, 2, 1), (3, 2, 1, 0)),
    CopyCase("permutation", _PERMUTATION, tuple(range(NUM_PAGES))),
    CopyCase("fan-out", (2, 2, 2, 2), (0, 8, 5, 1)),
    CopyCase("padding", (-1, 3, 4, -1, 0), (2, -1, 5, -1, 8)),
    CopyCase("only-padding", (-1, -1), (-1, -1)),
    CopyCase("padding-beside-last-page", (-1, 8, 2), (7, -1, 8)),
    CopyCase("outside-the-pool", (9, 1, -2, 2**31 - 1, 4, 5), (0, 9, 2, 3, -(2**31), 6)),
    CopyCase("one-element", (0, 5), (5, 0), shape=(1, 1, 1)),
    CopyCase("real-page", (0, 5, 7), (5, 1, 8), shape=(8, 16, 128)),
    *[CopyCase(f"dtype-{dtype}", (0, 1, 2, -1), (1, 2, 7, 3), dtype=dtype) for dtype in _DTYPES],
]

GATHER_CASES = [
    GatherCase("one", (3,)),
    GatherCase("none", ()),
    GatherCase("all", tuple(range(NUM_PAGES))),
    GatherCase("permutation", _PERMUTATION),
    GatherCase("repeats", (2, 2, 8, 2, 0, 0)),
    GatherCase("padding", (-1, 8, -1, 0, -1)),
    GatherCase("only-padding", (-1, -1, -1)),
    GatherCase("outside-the-pool", (9, 0, -2, 2**31 - 1, -(2**31), 8)),
    GatherCase("one-element", (8, -1), shape=(1, 1, 1)),
    GatherCase("real-page", (5, -1, 8), shape=(8, 16, 128)),
    *[GatherCase(f"dtype-{dtype}", (4, -1, 8, 0), dtype=dtype) for dtype in _DTYPES],
]
