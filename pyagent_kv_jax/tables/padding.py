"""Padding of lists on the host, so that few programs are compiled for many lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def power_of_two(size: int) -> int:
    """The least power of two that is at least ``size``; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def chunks(count: int, largest: int) -> Iterator[slice]:
    """``count`` things in pieces of powers of two, up to ``largest``, one itself: few programs, and no padding."""
    start = 0
    while start < count:
        size = min(1 << (count - start).bit_length() - 1, largest)
        yield slice(start, start + size)
        start += size


def padded(values: np.ndarray, size: int | None = None, fill: int = -1) -> np.ndarray:
    """``values`` i32[n] and then ``fill``, i32[size]; ``size`` None: to a power of two."""
    out = np.full(power_of_two(len(values)) if size is None else size, fill, np.int32)
    out[: len(values)] = values
    return out
