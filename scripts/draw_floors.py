"""Draw the floors of the library and the way of one step through them: ``docs/floors.png``.

python scripts/draw_floors.py docs/floors.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# From the top: the floor's name, then (folder, what it holds, left edge, width, number in a step's way or "").
FLOORS = [
    ("floor 5", [("serving/", "generate(), scheduler, command line; pictures/", 0.0, 0.64, "1"),
                 ("models/", "Llama, Qwen, Gemma 3 in NNX", 0.66, 0.34, "5")]),
    ("floor 4", [("manager/", "KVCacheManager: request ids, prefix cache, forks, preemption", 0.0, 0.64, "2"),
                 ("flax/", "for your own NNX or Linen code", 0.66, 0.34, "")]),
    ("floor 3", [("distributed/", "meshes, DCP, prefill to decode handoff", 0.0, 0.49, ""),
                 ("cache/", "K and V pages, layer groups, swap", 0.51, 0.49, "6")]),
    ("floor 2", [("pool/", "BlockPool: which block is whose", 0.0, 1.0, "3")]),
    ("floor 1", [("tables/", "BlockTable, SlotMapping: position to block to slot", 0.0, 1.0, "4")]),
    ("ground", [("pallas_kernels/", "bytes through a table: write, attention, gather, copy, merge", 0.0, 0.64, "7"),
                ("config, errors", "", 0.66, 0.34, "")]),
]  # fmt: skip
STEP = [
    "1  the scheduler picks requests for this step",
    "2  the manager finds computed prefixes, counts blocks",
    "3  the pool admits all rows in one operation",
    "4  tables append and map slots: the step's metadata",
    "5  the model runs; each layer brings q, k, v",
    "6  the cache writes and attends for (layer, metadata)",
    "7  kernels read and write pages through the table",
]
HEIGHT, GAP = 0.86, 0.14


def draw() -> Figure:
    """The picture; black on white, so that it prints."""
    figure = Figure(figsize=(12, 5.6))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(-0.11, 1.62)
    axes.set_ylim(-0.62, len(FLOORS) + 0.42)
    axes.axis("off")
    for level, (name, rooms) in enumerate(reversed(FLOORS)):
        bottom = level + GAP / 2
        axes.text(-0.015, bottom + HEIGHT / 2, name, ha="right", va="center", fontsize=10, color="0.35")
        for folder, holds, left, width, number in rooms:
            shade = "0.93" if name != "ground" else "0.82"
            axes.add_patch(FancyBboxPatch((left, bottom), width, HEIGHT, "round,pad=0,rounding_size=0.02",
                                          facecolor=shade, edgecolor="0.2", mutation_aspect=5))  # fmt: skip
            middle = bottom + (0.60 if holds else 0.5) * HEIGHT
            axes.text(left + 0.02, middle, folder, va="center", fontsize=12, weight="bold", family="monospace")
            axes.text(left + 0.02, bottom + 0.24 * HEIGHT, holds, va="center", fontsize=9)
            if number:
                axes.text(left + width - 0.025, middle, number, ha="center", va="center", fontsize=10, color="white",
                          bbox={"boxstyle": "circle,pad=0.25", "facecolor": "black"})  # fmt: skip
    top = len(FLOORS) + 0.2
    axes.text(0.0, top, "ordinary objects: request ids, locks, callbacks", fontsize=10, style="italic")
    axes.text(1.0, top, "pytrees and arrays only", fontsize=10, style="italic", ha="right")
    axes.text(1.07, top, "one step", fontsize=12, weight="bold")
    for place, line in enumerate(STEP):
        axes.text(1.07, len(FLOORS) - 0.3 - place * 0.86, line, fontsize=10, va="center")
    below = "Each floor imports only floors under it. From tables/ to cache/ all can run inside your own jit."
    axes.text(0.0, -0.35, below, fontsize=10, va="center")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1]), dpi=130)
