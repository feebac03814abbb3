"""How much of the memory that requests reserve holds no token, by block size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyagent_kv_jax.arguments import is_count
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import style

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def empty_share(lengths: ArrayLike, block_size: int) -> float:
    """Share of the slots in the blocks of requests of ``lengths`` i64[n] tokens that hold none; 0.0 of no tokens."""
    tokens = np.asarray(lengths, np.int64)
    slots = int((-(-tokens // block_size)).sum()) * block_size
    return 1.0 - int(tokens.sum()) / slots if slots else 0.0


def waste_by_block_size(
    lengths: ArrayLike,
    *,
    sizes: Sequence[int] = SIZES,
    row_tokens: int | None = None,
    in_use: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a bar for each block size, and one for a dense cache.

    Args:
        lengths: i64[n], tokens of real requests.
        sizes: of blocks, in tokens.
        row_tokens: tokens of a row of a dense cache that could serve them. None: those of the longest.
        in_use: the block size that is in use, to be pointed out.
        title: above the picture. None: what the lengths are.
        ax: where to draw. None: a new ``style.Picture``.

    Raises:
        InvalidArgumentError: no lengths, lengths that are no positive integers, sizes that are none, or rows that are
            too short for the longest.
    """
    tokens = np.asarray(lengths)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu" or tokens.min() < 1:
        raise InvalidArgumentError(
            f"lengths: got {tokens.dtype}{list(tokens.shape)}, want positive integers [n], n > 0"
        )
    if not sizes or not all(is_count(size) and size > 0 for size in sizes):
        raise InvalidArgumentError(f"sizes: got {list(sizes)}, want positive integers")
    longest = int(tokens.max())
    row = longest if row_tokens is None else row_tokens
    if row < longest:
        raise InvalidArgumentError(f"row_tokens: got {row}, want at least the {longest} of the longest request")
    figure, ax = style.panel(ax, 8.0, 3.4)
    shares = [*(empty_share(tokens, size) for size in sizes), empty_share(tokens, row)]
    labels = [*(str(size) for size in sizes), f"dense rows\nof {row:,}"]
    places = np.arange(len(shares), dtype=float)
    places[-1] += 0.5
    bars = ax.bar(places, shares, width=0.72, color=style.HOLDS_TOKENS, edgecolor=style.INK, linewidth=0.6)
    bars[-1].set(facecolor=style.EMPTY, hatch=style.EMPTY_HATCH)
    for bar, share in zip(bars, shares, strict=True):
        ax.annotate(
            _percent(share),
            (bar.get_x() + bar.get_width() / 2, share),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=style.SMALL_SIZE,
        )
    if in_use is not None and in_use in sizes:
        at = list(sizes).index(in_use)
        bars[at].set(linewidth=2.4)
        labels[at] += "\nin use"
    ax.set_xticks(places, labels)
    style.plain(ax)
    ax.set(ylim=(0, min(max(max(shares) * 1.15, 0.01), 1.08)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("block size, tokens", fontsize=style.TEXT_SIZE)
    ax.set_ylabel("reserved, but empty", fontsize=style.TEXT_SIZE)
    what = f"{tokens.size} requests of {tokens.min():,} to {longest:,} tokens, mean {tokens.mean():,.0f}"
    style.titled(ax, what if title is None else title)
    return figure


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.2g}%" if share >= 1 else f"{100 * share:.1f}%"
