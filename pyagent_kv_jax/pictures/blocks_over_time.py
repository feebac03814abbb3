"""Who held which memory over time: one line a block, one column a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pyagent_kv_jax.pictures import style


class BlocksPanel(NamedTuple):
    """One cache of the picture.

    Attributes:
        title: says what is seen.
        y_label: what one line is.
        owner: i32[T, U], the request that holds each unit of memory at each step, -1: free. Numbered as they came.
        used: bool[T, U], whether it holds a token.
        lines_per_tick: lines between two labels of the y axis.
    """

    title: str
    y_label: str
    owner: np.ndarray
    used: np.ndarray
    lines_per_tick: int = 64


def blocks_over_time(panels: Sequence[BlocksPanel]) -> Figure:
    """Draw the panels one above the other, on one scale of steps, as a new ``style.Picture``.

    Free memory is white, memory reserved but not used grey, used memory in the colour of its request; neighbouring
    requests also differ in lightness, so that a print in black and white can be read.
    """
    figure = style.Picture(figsize=(11, 4.2 * len(panels)), layout="constrained", dpi=style.DOTS_PER_INCH)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.imshow(_image(panel), aspect="auto", origin="lower", interpolation="nearest", resample=False)
        style.titled(axis, panel.title)
        axis.set_ylabel(panel.y_label)
        axis.set_yticks(np.arange(0, panel.owner.shape[1] + 1, panel.lines_per_tick))
    axes[-1, 0].set_xlabel("step (one pass of the model over the running requests)")
    axes[-1, 0].set_xlim(0, max(len(panel.owner) for panel in panels))
    figure.legend(
        handles=[
            Patch(facecolor=style.owner_color(0), label="holds tokens (one colour a request)"),
            Patch(facecolor=style.EMPTY, label="reserved for a request, but empty"),
            Patch(facecolor=style.FREE, edgecolor=style.INK, label="free"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def _image(panel: BlocksPanel) -> np.ndarray:
    """RGB f32[U, T, 3]."""
    colors = np.array([style.owner_color(i) for i in range(max(int(panel.owner.max()) + 1, 1))], np.float32)
    image = np.ones((*panel.owner.shape, 3), np.float32)
    held = panel.owner >= 0
    image[held] = style.EMPTY
    image[held & panel.used] = colors[panel.owner[held & panel.used]]
    return np.swapaxes(image, 0, 1)
