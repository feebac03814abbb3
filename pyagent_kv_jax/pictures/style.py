"""The look of every picture, in one place: colours, hatches, sizes, and the figures they are drawn on.

Colours are those of Okabe and Ito (2008), which people with any kind of colour blindness can tell apart. Nothing is
told by colour alone: what has a colour also has a mark, a hatch or a place of its own, so that a print in grey can be
read.
"""

from __future__ import annotations

import io
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pyagent_kv_jax.notebook_display import USED_COLOR

Color = tuple[float, float, float]

OWNERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # dark and light in turn; no yellow
HOLDS_TOKENS = USED_COLOR
EMPTY: Color = (0.89, 0.89, 0.89)  # reserved, but nothing is in it
CACHED_FREE = "#CDE7F5"
FREE = "#FFFFFF"
INK = "#222222"
FAINT = "#9A9A9A"
TIMES = "\N{MULTIPLICATION SIGN}"

CACHED_HATCH = "..."
EMPTY_HATCH = "////"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo")

TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 11, 9, 8
DOTS_PER_INCH = 110


class Panel(NamedTuple):
    """Where a picture is drawn."""

    figure: Figure
    ax: Axes


class Picture(Figure):
    """A figure that shows itself in a notebook when it is the value of a cell. ``pyplot`` knows nothing of it.

    So it is never shown twice, needs no ``close``, and leaves the backend as it is. ``savefig`` works as ever.
    """

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.08)
        return data.getvalue()


def panel(ax: Axes | None, width: float, height: float) -> Panel:
    """The figure of ``ax``, or a new one of so many inches."""
    if ax is not None:
        figure: Any = ax.figure
        return Panel(figure if isinstance(figure, Figure) else figure.figure, ax)  # of a subfigure: the whole
    new = Picture(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    return Panel(new, new.add_subplot())


def owner_color(owner: int) -> Color:
    """Of the n-th owner: six hues, then the same darker, then lighter, then from the start again."""
    hue, level = to_rgb(OWNERS[owner % len(OWNERS)]), owner // len(OWNERS) % 3
    return (hue, mixed(hue, (0, 0, 0), 0.38), mixed(hue, (1, 1, 1), 0.35))[level]


def owner_mark(owner: int) -> str:
    """Of the n-th owner: A to Z, AA, AB, ..."""
    letters = ""
    owner += 1
    while owner:
        owner, place = divmod(owner - 1, 26)
        letters = chr(ord("A") + place) + letters
    return letters


def mixed(color: Color, with_color: Color, share: float) -> Color:
    """``color`` with so much of another in it."""
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(color, with_color, strict=True))
    return red, green, blue


def paler(color: Color) -> Color:
    """The same hue for what is empty, or only kept."""
    return mixed(color, (1, 1, 1), 0.7)


def ink_on(color: Color) -> str:
    """Black or white, whichever is read better on ``color``."""
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#FFFFFF"


def bare(ax: Axes) -> None:
    """Without ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def plain(ax: Axes, *, grid: Literal["both", "x", "y"] | None = "y") -> None:
    """With the left and the lower axis only, and faint lines to read values by."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL_SIZE)
    if grid:
        ax.grid(True, axis=grid, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)


def titled(ax: Axes, title: str) -> None:
    """What is seen, above it on the left."""
    ax.set_title(title, loc="left", fontsize=TITLE_SIZE)
