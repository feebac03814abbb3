"""Who owns what now: every block of a pool as one cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from pyagent_kv_jax.pictures import style
from pyagent_kv_jax.pictures.block_owners import BlockOwners, block_owners

_ROWS = ((8, 24), (16, 192), (32, 1024), (64, 6144))  # cells of a row, up to so many blocks
_MOST_NAMED = 12  # owners in the legend
_SMALLEST_DOTTED = 18  # points; in smaller cells there is no room for dots
_POINTS_A_LETTER = 0.62  # of the text's size


class _Grid(NamedTuple):
    """Cells in rows of equal length, block 0 at the top left."""

    columns: int
    rows: int
    cell: float  # points

    @classmethod
    def of(cls, num_blocks: int, width: float) -> _Grid:
        """In rows of 8, 16, 32, 64 or 128 blocks, so that few blocks are large; ``width`` in inches."""
        columns = next((columns for columns, most in _ROWS if num_blocks <= most), 128)
        return cls(columns, -(-num_blocks // columns), 72 * width / columns)


def block_map(
    of: Any,
    table: Any = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw every block of a pool: whose it is, whether it is shared, cached, set aside or free.

    An owner has a colour and letters (A, B, ...). Where cells are too small for letters, they stand once on each run of
    blocks that has room for them. A cell is coloured as far as tokens fill it.

    Args:
        of: a ``KVCacheManager``, a ``PagedKVCache``, or a ``BlockPool``. Not traced.
        table: of a ``BlockPool``: the ``BlockTable`` or ``SparseBlockTable`` whose rows hold its blocks. None: blocks
            in use are drawn as held by somebody.
        names: of the table's rows; a manager's requests have names already.
        title: above the picture. None: counts.
        ax: where to draw. None: a new ``style.Picture``, which ``pyplot`` does not know.

    Returns:
        The figure. Costs O(pool) on the host.

    Raises:
        InvalidArgumentError: see ``block_owners``.
    """
    owners = block_owners(of, table, names)
    num_blocks = len(owners.references)
    width = 8.0
    grid = _Grid.of(num_blocks, width * 0.97)
    height = grid.rows * grid.cell / 72
    if ax is None:
        legend_rows = math.ceil((len(_owner_labels(owners)) + 6) / 2)
        figure, ax = style.panel(None, width, height + 0.45 + 0.175 * legend_rows)
    else:
        figure, ax = style.panel(ax, width, height)
        grid = grid._replace(cell=72 * ax.get_position().width * figure.get_figwidth() / grid.columns)
    style.bare(ax)
    ax.set(xlim=(-0.05, grid.columns + 0.05), ylim=(grid.rows + 0.05, -0.05), aspect="equal")
    _draw_cells(ax, owners, grid)
    _write_marks(ax, owners, grid)
    _number_rows(ax, grid)
    style.titled(ax, _title(owners) if title is None else title)
    _explain(ax, owners, grid)
    return figure


def _draw_cells(ax: Axes, owners: BlockOwners, grid: _Grid) -> None:
    line = min(max(grid.cell / 40, 0.15), 0.8)
    gap = 0.04 if grid.cell > 10 else 0.0
    known = owners.owner >= 0
    full = max(owners.block_size or 1, 1)
    share = np.where(known, owners.tokens / full, 1.0)
    colors = [style.owner_color(owner) for owner in range(len(owners.names))]

    def add(name: str, blocks: np.ndarray, faces: Sequence[Any], widths: np.ndarray | None = None, **look: Any) -> None:
        if not len(blocks):
            return
        cells = [
            Rectangle((b % grid.columns + gap, b // grid.columns + gap), (1 - 2 * gap) * w, 1 - 2 * gap)
            for b, w in zip(blocks.tolist(), (np.ones(len(blocks)) if widths is None else widths).tolist(), strict=True)
        ]
        ax.add_collection(PatchCollection(cells, facecolors=faces, gid=name, **look))

    edge: dict[str, Any] = {"edgecolors": style.FAINT, "linewidths": line}
    dense = 1 if grid.cell > 24 else 0
    held = np.flatnonzero(owners.held & known)
    add("free", np.flatnonzero(owners.free), [style.FREE], **edge)
    add(
        "cached and free",
        np.flatnonzero(owners.cached_free),
        [style.CACHED_FREE],
        hatch=style.CACHED_HATCH[: 2 + dense] if grid.cell > 7 else None,
        **edge,
    )
    unknown = np.flatnonzero(owners.held & ~known)
    add("held", unknown, [style.EMPTY], edgecolors=style.INK, linewidths=line)
    pale = [style.paler(colors[o]) for o in owners.owner[held]]
    add("held, room", held, pale, edgecolors=style.INK, linewidths=line)
    solid = [colors[o] for o in owners.owner[held]]
    add("held, tokens", held, solid, share[held], edgecolors="none", linewidths=0)
    aside = np.flatnonzero(owners.set_aside)
    hatch = style.EMPTY_HATCH[: 3 + dense]
    add("set aside", aside, ["none"], hatch=hatch, edgecolors=style.FAINT, linewidths=line)
    shared = np.flatnonzero(owners.shared)
    add("shared", shared, ["none"], edgecolors=style.INK, linewidths=min(max(grid.cell / 11, 0.8), 2.6))
    if grid.cell > _SMALLEST_DOTTED:
        kept = np.flatnonzero(owners.held & owners.cached)
        x, y = kept % grid.columns + 0.85, kept // grid.columns + 0.17
        ink = [style.ink_on(_seen_color(owners, b, right=True)) for b in kept.tolist()]
        ax.scatter(x, y, s=(grid.cell / 8) ** 2, c=ink, linewidths=0, gid="cached and held", zorder=3)


def _seen_color(owners: BlockOwners, block: int, *, right: bool = False) -> style.Color:
    """What a mark in the middle of a cell, or at its right, is written on."""
    if owners.owner[block] < 0:
        return style.EMPTY
    color = style.owner_color(int(owners.owner[block]))
    share = owners.tokens[block] / max(owners.block_size or 1, 1)
    return color if share > (0.9 if right else 0.55) else style.paler(color)


def _mark(owners: BlockOwners, block: int) -> str:
    owner = int(owners.owner[block])
    letters = "?" if owner < 0 else style.owner_mark(owner)
    if owners.num_groups > 1 and owners.group[block] >= 0:
        letters += str(owners.group[block])
    return letters + (f"{style.TIMES}{owners.references[block]}" if owners.references[block] > 1 else "")


def _write_marks(ax: Axes, owners: BlockOwners, grid: _Grid) -> None:
    """In each cell that has room; else in the middle of each run of alike cells that has."""
    largest = min(max(grid.cell * 0.34, 5.5), 13.0)
    for first, end in _runs(owners, grid):
        mark = _mark(owners, first)
        bold = owners.references[first] > 1
        inside = (grid.cell - 6) / (len(mark) * _POINTS_A_LETTER * (1.15 if bold else 1.0))  # the frame is thick
        size = min(largest, max(inside, 5.5))
        needed = len(mark) * _POINTS_A_LETTER * size
        each = grid.cell > max(needed, 1.25 * size) and (end - first == 1 or grid.cell > 15)
        if not each and (grid.cell * (end - first) < needed + 2 or grid.cell < 0.75 * size):
            continue
        for block in range(first, end) if each else [first + (end - first) // 2]:
            middle = 0.5 if each else (end - first) / 2 - (end - first) // 2
            x, y = block % grid.columns + middle, block // grid.columns + 0.52
            ink = style.ink_on(_seen_color(owners, block))
            weight = "bold" if bold else "normal"
            text = ax.text(
                x, y, mark, ha="center", va="center", fontsize=size, color=ink, fontweight=weight, clip_on=True
            )
            if 0.2 < owners.tokens[block] / (owners.block_size or 1) < 0.8 and owners.owner[block] >= 0:
                text.set(color=style.INK, path_effects=[withStroke(linewidth=2, foreground="white")])


def _runs(owners: BlockOwners, grid: _Grid) -> list[tuple[int, int]]:
    """(first, end) of the held cells that stand side by side in one row of the grid and have one mark."""
    held = owners.held
    what = np.stack([owners.owner, owners.references, owners.group], axis=1)
    starts = np.ones(len(held), bool)
    starts[1:] = (what[1:] != what[:-1]).any(axis=1)
    starts[:: grid.columns] = True
    firsts = np.flatnonzero(starts)
    ends = np.append(firsts[1:], len(held))
    return [(a, b) for a, b in zip(firsts.tolist(), ends.tolist(), strict=True) if held[a]]


def _number_rows(ax: Axes, grid: _Grid) -> None:
    step = max(1, math.ceil(11 / grid.cell))
    rows = range(0, grid.rows, step)
    ax.set_yticks([row + 0.5 for row in rows], [str(row * grid.columns) for row in rows], fontsize=style.SMALL_SIZE)
    ax.set_ylabel("block id of the first cell", fontsize=style.SMALL_SIZE)
    ax.tick_params(axis="y", length=0, pad=2)


def _title(owners: BlockOwners) -> str:
    size = "" if owners.block_size is None else f" of {owners.block_size} tokens"
    held, free, kept = (int(kind.sum()) for kind in (owners.held, owners.free, owners.cached_free))
    return f"{len(owners.references)} blocks{size}: {held} held, {kept} cached and free, {free} free"


def _owner_labels(owners: BlockOwners) -> list[str]:
    labels = [
        f"{style.owner_mark(i)}  {_shortened(name)}: {tokens} tokens in {blocks} blocks"
        for i, (name, tokens, blocks) in enumerate(
            zip(owners.names, owners.num_tokens.tolist(), owners.num_columns.tolist(), strict=True)
        )
    ]
    if len(labels) > _MOST_NAMED:
        return [
            *labels[: _MOST_NAMED - 1],
            f"... and {len(labels) - _MOST_NAMED + 1} more, each with letters of its own",
        ]
    return labels


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _explain(ax: Axes, owners: BlockOwners, grid: _Grid) -> None:
    """A legend of what is there, in words."""
    handles: list[Any] = []
    labels = _owner_labels(owners)
    for i in range(len(labels)):
        more = i == _MOST_NAMED - 1 and len(owners.names) > _MOST_NAMED
        handles.append(
            Patch(facecolor="none" if more else style.owner_color(i), edgecolor="none" if more else style.INK)
        )
    edge = style.FAINT
    kinds: list[tuple[np.ndarray, Any, str]] = [
        (owners.held & (owners.owner < 0), Patch(facecolor=style.EMPTY, edgecolor=style.INK), "?  held by somebody"),
        (
            owners.shared,
            Patch(facecolor="none", edgecolor=style.INK, linewidth=2.2),
            f"thick frame, {style.TIMES}n: shared by n; letters of the first",
        ),
        (
            (owners.tokens > 0) & (owners.tokens < (owners.block_size or 0)),
            (Patch(facecolor="#666666"), Patch(facecolor="#DDDDDD")),
            "pale: room for tokens to come",
        ),
        (
            owners.set_aside & (owners.block_size is not None),
            Patch(facecolor="white", edgecolor=edge, hatch=style.EMPTY_HATCH),
            "striped: set aside, no token yet",
        ),
        (
            owners.held & owners.cached & (grid.cell > _SMALLEST_DOTTED),
            Line2D([], [], linestyle="none", marker="o", color=style.INK, markersize=4),
            "dot at the top right: also in the prefix cache",
        ),
        (
            owners.cached_free,
            Patch(facecolor=style.CACHED_FREE, edgecolor=edge, hatch=style.CACHED_HATCH),
            "dotted: free, content kept until the block is needed",
        ),
        (owners.free, Patch(facecolor=style.FREE, edgecolor=edge), "white: free"),
    ]
    for blocks, handle, label in kinds:
        count = int(blocks.sum())
        if count:
            handles.append(handle)
            labels.append(f"{label} ({count})")
    if owners.num_groups > 1:
        handles.append(Patch(facecolor="none", edgecolor="none"))
        labels.append("number after the letter: layer group")
    ax.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        borderaxespad=0.2,
        ncols=2,
        frameon=False,
        fontsize=style.SMALL_SIZE,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
