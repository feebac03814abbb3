"""One picture: who held which memory over time."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from pyagent_kv_jax.serving.cache_record import CacheHistory

WASTE = (0.86, 0.86, 0.86)


class Panel(NamedTuple):
    """One cache of the picture.

    Attributes:
        title: says what is seen.
        y_label: what one line is.
        history: over time.
        lines_per_tick: lines between two labels of the y axis.
    """

    title: str
    y_label: str
    history: CacheHistory
    lines_per_tick: int = 64


def save_block_map(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels one above the other, on one scale of steps, and write a PNG.

    Free memory is white, memory reserved but not used grey, used memory in the colour of its request; neighbouring
    requests also differ in lightness, so that a print in black and white can be read.
    """
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 4.2 * len(panels)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.imshow(_image(panel.history), aspect="auto", origin="lower", interpolation="nearest", resample=False)
        axis.set_title(panel.title, loc="left")
        axis.set_ylabel(panel.y_label)
        axis.set_yticks(np.arange(0, panel.history.owner.shape[1] + 1, panel.lines_per_tick))
    axes[-1, 0].set_xlabel("step (one pass of the model over the running requests)")
    axes[-1, 0].set_xlim(0, max(len(panel.history.owner) for panel in panels))
    figure.legend(
        handles=[
            Patch(facecolor=_color(0), label="holds tokens (one colour a request)"),
            Patch(facecolor=WASTE, label="reserved for a request, but empty"),
            Patch(facecolor="white", edgecolor="black", label="free"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _color(request: int) -> tuple[float, float, float]:
    """Hue by the golden ratio, lightness in turn dark, middle and light."""
    return colorsys.hls_to_rgb((request * 0.618034 + 0.58) % 1.0, (0.32, 0.46, 0.62)[request % 3], 0.62)


def _image(history: CacheHistory) -> np.ndarray:
    """RGB f32[U, T, 3]."""
    colors = np.array([_color(i) for i in range(max(int(history.owner.max()) + 1, 1))], np.float32)
    image = np.ones((*history.owner.shape, 3), np.float32)
    held = history.owner >= 0
    image[held] = WASTE
    image[held & history.used] = colors[history.owner[held & history.used]]
    return np.swapaxes(image, 0, 1)
