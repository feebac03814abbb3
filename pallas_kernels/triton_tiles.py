"""Ranges as slices of sizes that are powers of two, the only ones Triton has."""

from __future__ import annotations

from typing import Any

from jax.experimental import pallas as pl


def powers_of_2(size: int) -> list[Any]:
    """``range(size)`` in slices: 80 as 64 and 16, 96 as 64 and 32."""
    pieces, start = [], 0
    while start < size:
        piece = 1 << ((size - start).bit_length() - 1)
        pieces.append(pl.ds(start, piece))
        start += piece
    return pieces
