"""The tree of cached prefixes: which blocks begin which requests, who holds them, and how often they were hit."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from pyagent_kv_jax.arguments import layer_index
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.manager.manager_snapshot import ManagerSnapshot
from pyagent_kv_jax.pictures import style

_MOST_LETTERS = 26  # of a line in a box


@dataclasses.dataclass(frozen=True)
class PrefixRun:
    """Blocks one after another that no other prefix branches off from, and that the same requests hold.

    Attributes:
        blocks: ids, in order.
        first_column: blocks of the prefix before the first.
        num_tokens: in the run.
        holders: indices of the requests that hold it; none: it is free, and its content is kept.
        hits: requests that began with its first block since it was cached.
        parent: index of the run before it; -1: none, or (``first_column`` > 0) it has been evicted.
    """

    blocks: tuple[int, ...]
    first_column: int
    num_tokens: int
    holders: tuple[int, ...]
    hits: int
    parent: int


def prefix_runs(seen: ManagerSnapshot, group: int = 0) -> list[PrefixRun]:
    """The tree of a layer group, parents before their children, the first by block id."""
    known = seen.prefix_blocks[group]
    at = {key: i for i, key in enumerate(known.keys.tolist())}
    columns = known.columns.tolist()
    parent = [at.get(key, -1) for key in known.parents.tolist()]
    # Keys are names here, no proofs: only a block one column before can be the parent.
    parent = [i if i >= 0 and columns[i] == column - 1 else -1 for i, column in zip(parent, columns, strict=True)]
    children: dict[int, list[int]] = defaultdict(list)
    for i, above in enumerate(parent):
        children[above].append(i)
    holders: dict[int, list[int]] = defaultdict(list)
    for request, blocks in enumerate(seen.block_tables[group]):
        for block in blocks[blocks >= 0].tolist():
            holders[block].append(request)
    held_by = [tuple(holders[block]) for block in known.ids.tolist()]
    block_size, runs = seen.config.block_size, []
    waiting = [(first, -1) for first in reversed(children[-1])]
    while waiting:
        first, above = waiting.pop()
        run = [first]
        while len(children[run[-1]]) == 1 and _alike(held_by, known.hits, run[-1], children[run[-1]][0]):
            run.append(children[run[-1]][0])
        blocks = tuple(known.ids[run].tolist())
        column, hits = int(known.columns[first]), int(known.hits[first])
        runs.append(PrefixRun(blocks, column, len(run) * block_size, held_by[first], hits, above))
        waiting += [(child, len(runs) - 1) for child in reversed(children[run[-1]])]
    return runs


def _alike(held_by: list[tuple[int, ...]], hits: np.ndarray, one: int, other: int) -> bool:
    return held_by[one] == held_by[other] and hits[one] == hits[other]


def prefix_tree(
    manager: KVCacheManager,
    *,
    layer_idx: int = 0,
    most_runs: int = 48,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw what the prefix cache of a manager holds, from the first block on the left to the last on the right.

    A box is a run of blocks without a branch. Boxes that requests hold are solid and name them; boxes of free blocks,
    whose content is kept until the blocks are needed, are pale and dashed.

    Args:
        manager: read once, under its lock; costs O(pool).
        layer_idx: selects the layer's group.
        most_runs: boxes to be drawn; the rest is counted.
        title: above the picture. None: counts.
        ax: where to draw. None: a new ``style.Picture``.

    Raises:
        InvalidArgumentError: not a manager, or no such layer.
    """
    if not isinstance(manager, KVCacheManager):
        raise InvalidArgumentError(f"prefix_tree: got {type(manager).__name__}, want a KVCacheManager")
    seen, rate = manager.snapshot(), manager.stats().hit_rate
    group = seen.config.group_of(layer_index(layer_idx, seen.config.num_layers, "layer_idx"))
    runs = prefix_runs(seen, group)
    shown = runs[:most_runs]
    rows = _rows_of(shown)
    places = _columns_of(shown)
    height = max((max(rows, default=0) + 1) * 0.62, 0.8)
    right = max((left + width for left, width in places), default=1.0)
    figure, ax = style.panel(ax, max(9.0, 1.5 * right), height + 1.15)
    style.bare(ax)
    for i, run in enumerate(shown):
        _draw_run(ax, run, seen, places[i], rows[i], None if run.parent < 0 else (places[run.parent], rows[run.parent]))
    ax.set(xlim=(-0.6, max(right, 4.0) + 0.1), ylim=(max(rows, default=0) + 0.55, -0.55))
    tokens = sum(run.num_tokens for run in runs)
    kept = sum(run.num_tokens for run in runs if not run.holders)
    counts = f"{tokens:,} tokens in {tokens // seen.config.block_size} cached blocks, {kept:,} of them held by nobody"
    style.titled(ax, title or f"Prefix cache: {counts}; hit rate {rate:.0%}")
    if not runs:
        ax.text(
            0.5, 0.5, "nothing is cached", transform=ax.transAxes, ha="center", va="center", fontsize=style.TEXT_SIZE
        )
    if len(runs) > most_runs:
        ax.set_xlabel(f"... and {len(runs) - most_runs} more runs", fontsize=style.SMALL_SIZE, loc="left")
    _explain(ax)
    return figure


def _columns_of(runs: list[PrefixRun]) -> list[tuple[float, float]]:
    """Left edge and width of each box: a column for each level."""
    depth: list[int] = []
    for run in runs:
        depth.append(0 if run.parent < 0 else depth[run.parent] + 1)
    return [(1.7 * level, 1.28) for level in depth]


def _rows_of(runs: list[PrefixRun]) -> list[float]:
    """A line for each leaf; what has children stands beside the middle of them."""
    children: dict[int, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        children[run.parent].append(i)
    rows = [0.0] * len(runs)
    line = 0
    for i in range(len(runs)):
        if not children[i]:
            rows[i] = line
            line += 1
    for i in reversed(range(len(runs))):
        if children[i]:
            rows[i] = (rows[children[i][0]] + rows[children[i][-1]]) / 2
    return rows


def _draw_run(
    ax: Axes,
    run: PrefixRun,
    seen: ManagerSnapshot,
    place: tuple[float, float],
    row: float,
    parent: tuple[tuple[float, float], float] | None,
) -> None:
    left, width = place
    held = bool(run.holders)
    color = style.paler(style.owner_color(run.holders[0])) if held else style.CACHED_FREE
    ax.add_patch(
        FancyBboxPatch(
            (left, row - 0.33),
            width,
            0.66,
            boxstyle="round,pad=0,rounding_size=0.06",
            mutation_aspect=1.6,
            facecolor=color if held else "#F4FAFD",
            edgecolor=style.INK if held else style.FAINT,
            linewidth=(1.0 if len(run.holders) == 1 else 2.2) if held else 1.0,
            linestyle="-" if held else (0, (4, 2)),
            gid="held" if held else "free",
        )
    )
    ink = style.INK if held else "#5A5A5A"
    lines = [_blocks(run.blocks), _holders(run.holders, seen.request_ids) if held else "held by nobody"]
    if run.hits:
        lines.append(f"{run.hits} hit{'s' if run.hits > 1 else ''}")
    ax.text(left + 0.05, row, "\n".join(lines), ha="left", va="center", fontsize=7.2, color=ink, linespacing=1.15)
    start, text = left - 0.4, f"{run.num_tokens:,}"
    if parent is not None:
        start = parent[0][0] + parent[0][1]
        ax.plot([start, start + 0.12, start + 0.12, left], [parent[1], parent[1], row, row], color=ink, linewidth=1)
    else:
        ax.plot([start, left], [row, row], color=ink, linewidth=1, linestyle=":" if run.first_column else "-")
        if not run.first_column:
            ax.plot([start], [row], marker="o", markersize=4, color=ink)
        text += f"\nafter {run.first_column * seen.config.block_size:,} evicted" if run.first_column else ""
    ax.text(left - 0.03, row - 0.03, text, ha="right", va="bottom", fontsize=7, color=ink)


def _blocks(blocks: tuple[int, ...]) -> str:
    """Ids, with runs in short."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][1] + 1:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    name = "block " if len(blocks) == 1 else "blocks "
    text = name + ", ".join(texts)
    return text if len(text) <= _MOST_LETTERS else f"{len(blocks)} blocks: {texts[0]}, …, {texts[-1]}"


def _holders(holders: tuple[int, ...], names: tuple[str, ...]) -> str:
    for count in (2, 1):
        text = ", ".join(_short(names[i]) for i in holders[:count])
        text += f" and {len(holders) - count} more" if len(holders) > count else ""
        if len(text) <= _MOST_LETTERS:
            break
    return text


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _explain(ax: Axes) -> None:
    handles = [
        Patch(facecolor=style.paler(style.owner_color(0)), edgecolor=style.INK, linewidth=1.0),
        Patch(facecolor=style.paler(style.owner_color(0)), edgecolor=style.INK, linewidth=2.2),
        Patch(facecolor="#F4FAFD", edgecolor=style.FAINT, linestyle=(0, (2, 1))),
    ]
    labels = ["held by one request", "shared by several", "held by nobody: content kept, block free"]
    ax.legend(
        handles,
        labels,
        title="From the left: the first tokens of requests. On a line: tokens in the box after it.\n"
        "In a box: block ids, who holds them, and how many requests began with them (hits).",
        title_fontsize=style.SMALL_SIZE,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=3,
        frameon=False,
        fontsize=style.SMALL_SIZE,
    )
