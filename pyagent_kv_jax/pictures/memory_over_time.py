"""What the pool's blocks were used for, step by step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import style
from pyagent_kv_jax.pictures.block_owners import block_owners

Unit = Literal["blocks", "tokens", "bytes"]


class MemoryHistory(NamedTuple):
    """A pool over T steps.

    Attributes:
        num_blocks: i64[T], of the pool; they change with the block size.
        block_size: i64[T], tokens of a block.
        held: i64[T], blocks that somebody holds.
        cached_free: i64[T], free blocks whose content is kept.
        tokens: i64[T], tokens that held blocks hold; those of a shared block count once, of several layer groups in
            each.
        owners: i64[T], requests (or rows) that hold blocks.
        block_bytes: i64[T], bytes of a block.
    """

    num_blocks: np.ndarray
    block_size: np.ndarray
    held: np.ndarray
    cached_free: np.ndarray
    tokens: np.ndarray
    owners: np.ndarray
    block_bytes: np.ndarray

    @property
    def empty_share(self) -> float:
        """Share of the held memory that holds no token, over all steps; 0.0 if nothing was held."""
        held = float((self.held * self.block_size).sum())
        return 1.0 - float(self.tokens.sum()) / held if held else 0.0


@dataclasses.dataclass
class MemoryRecorder:
    """Takes note of a manager or a cache once a step.

    >>> recorder = MemoryRecorder()
    >>> for tokens in steps:
    ...     cache = step(params, cache, tokens)
    ...     recorder.record(cache)
    >>> memory_over_time(recorder.history())
    """

    _steps: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def record(self, of: Any) -> None:
        """Note what is so now: of a ``KVCacheManager`` or a ``PagedKVCache``. Costs O(pool), and waits for its arrays.

        Raises:
            InvalidArgumentError: another object, or a traced one.
        """
        config = getattr(of, "config", None)
        if config is None:
            raise InvalidArgumentError(f"record: got {type(of).__name__}, want a KVCacheManager or a PagedKVCache")
        now = block_owners(of)
        counts = (int(now.held.sum()), int(now.cached_free.sum()), int(now.tokens[now.held].sum()), len(now.names))
        self._steps.append((len(now.held), config.block_size, *counts, config.block_size_bytes()))

    def history(self) -> MemoryHistory:
        """All steps so far."""
        columns = np.array(self._steps, np.int64).reshape(len(self._steps), len(MemoryHistory._fields)).T
        return MemoryHistory(*columns)


def memory_over_time(
    history: MemoryHistory, *, unit: Unit = "bytes", title: str | None = None, ax: Axes | None = None
) -> Figure:
    """Draw held, cached and free memory against steps: areas that add up to the pool.

    Args:
        history: of a ``MemoryRecorder``.
        unit: of the memory.
        title: above the picture. None: what the steps had on the average.
        ax: where to draw. None: a new ``style.Picture``.

    Raises:
        InvalidArgumentError: no steps, or another unit.
    """
    if unit not in ("blocks", "tokens", "bytes"):
        raise InvalidArgumentError(f"unit: got {unit!r}, want 'blocks', 'tokens' or 'bytes'")
    if not isinstance(history, MemoryHistory):
        got = type(history).__name__
        raise InvalidArgumentError(f"history: got {got}, want a MemoryHistory: history() of a MemoryRecorder")
    steps = len(history.held)
    if not steps:
        raise InvalidArgumentError("history: got no steps, want at least one")
    figure, ax = style.panel(ax, 8.0, 3.9)
    per_block = {"blocks": np.ones(steps), "tokens": history.block_size, "bytes": history.block_bytes}[unit]
    total = history.num_blocks * per_block
    scale, name = _scale(float(total.max())) if unit == "bytes" else (1.0, unit)
    filled = history.tokens / history.block_size
    parts = [
        (filled, style.HOLDS_TOKENS, None, "holds tokens"),
        (history.held - filled, style.EMPTY, style.EMPTY_HATCH, "held, no token in it yet"),
        (history.cached_free, style.CACHED_FREE, style.CACHED_HATCH, "free, cached content kept"),
        (history.num_blocks - history.held - history.cached_free, style.FREE, None, "free"),
    ]
    below, x = np.zeros(steps), np.arange(steps + 1)
    for blocks, color, hatch, label in parts:
        above = below + blocks * per_block / scale
        mean = (blocks * per_block / scale).mean()
        ax.fill_between(
            x,
            np.append(below, below[-1]),
            np.append(above, above[-1]),
            step="post",
            facecolor=color,
            hatch=hatch,
            edgecolor=style.FAINT,
            linewidth=0.5,
            label=f"{label} (mean {_number(mean)})",
        )
        below = above
    ax.plot(x, np.append(total, total[-1]) / scale, color=style.INK, linewidth=1.2, drawstyle="steps-post")
    style.plain(ax, grid=None)
    ax.set(xlim=(0, steps), ylim=(0, float(total.max()) / scale * 1.02))
    ax.set_xlabel("step", fontsize=style.TEXT_SIZE)
    ax.set_ylabel(f"memory of the pool, {name}", fontsize=style.TEXT_SIZE)
    requests = f"{history.owners.mean():.1f} requests in flight on the average"
    style.titled(ax, title or f"{requests}; {history.empty_share:.1%} of what they hold is empty")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, -0.16),
        ncols=2,
        frameon=False,
        fontsize=style.SMALL_SIZE,
        handleheight=1.4,
    )
    return figure


def _scale(num_bytes: float) -> tuple[float, str]:
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return float(2**power), name
    return 1.0, "bytes"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2g}"
