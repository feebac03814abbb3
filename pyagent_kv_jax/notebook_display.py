"""How objects show themselves: a line of text, or a small piece of HTML in a notebook. Imports nothing of ours.

The HTML is self-contained: styles stand in the elements, nothing runs, and colours are those of the page (light or
dark) or readable on both. Everything from outside is escaped.

Nothing here raises: what has no value now (traced, deleted, a ``ShapeDtypeStruct``, None) is shown by its shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import jax
import numpy as np

USED_COLOR, EMPTY_COLOR, KEPT_COLOR = "#0072B2", "#BDBDBD", "#8CC6E8"
MOST_ROWS = 16

_PATIENCE = 1.0  # seconds to wait for an array that is still being computed
_LINE = "border-bottom:1px solid rgba(128,128,128,.35)"
_FRAME = "border:1px solid currentColor"
_STRIPES = "repeating-linear-gradient(45deg,{0} 0 3px,transparent 3px 6px)"


class Part(NamedTuple):
    """One part of a bar.

    Attributes:
        label: what it is.
        amount: how much.
        color: of it; None: as the page.
        striped: so that it differs from its neighbours in grey too.
    """

    label: str
    amount: int
    color: str | None
    striped: bool = False


class Rows(NamedTuple):
    """A table of n rows, of which those that are shown are given.

    Attributes:
        head: of the columns; the first is text, the others are numbers.
        cells: of the rows that are shown.
        num_rows: n.
        what: they are, in words.
        text_columns: those that are no numbers.
    """

    head: Sequence[str]
    cells: Sequence[Sequence[Any]]
    num_rows: int
    what: str
    text_columns: tuple[int, ...] = (0,)


def values_of(*arrays: Any) -> list[np.ndarray] | None:
    """The values of arrays, on the host; None where one has none that could be read at once.

    That is: traced or abstract ones, deleted (donated) ones, those spread over other hosts, and those that are still
    being computed after a second.
    """
    try:
        if any(isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray) for array in arrays):
            return None
        deadline = time.monotonic() + _PATIENCE
        found = []
        for array in arrays:
            if isinstance(array, jax.Array):
                if array.is_deleted():
                    return None
                while not array.is_ready():  # type: ignore[attr-defined]
                    if time.monotonic() > deadline:
                        return None
                    time.sleep(0.002)
                if not array.is_fully_addressable:
                    if not array.is_fully_replicated:
                        return None
                    array = array.addressable_data(0)
            found.append(np.asarray(array))
        return found
    except Exception:
        return None


def shape_text(leaf: Any) -> str:
    """``int32[4,8]`` for what has a shape and a dtype, else what it is; of a pytree, its leaves'."""
    try:
        if leaf is None:
            return "None"
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            sizes = ",".join(str(size) for size in leaf.shape)
            gone = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
            return f"{leaf.dtype}[{sizes}]" + (" (deleted)" if gone else "")
        return type(leaf).__name__
    except Exception:
        return type(leaf).__name__


def fields_line(shown: object, names: Sequence[str]) -> str:
    """The object by the shapes of its fields."""
    return f"{type(shown).__name__}({', '.join(f'{name}={shape_text(getattr(shown, name, None))}' for name in names)})"


def attempt(make: Callable[[], str], instead: Callable[[], str]) -> str:
    """What ``make`` gives, or where it cannot, what ``instead`` does."""
    try:
        return make()
    except Exception:
        return instead()


def fields_html(shown: object, names: Sequence[str]) -> str:
    """The object by the shapes of its fields, for a notebook."""
    cells = [(name, shape_text(getattr(shown, name, None))) for name in names]
    return card(
        type(shown).__name__,
        "without values here: shapes",
        rows=Rows(("field", "is"), cells, len(cells), "fields", (0, 1)),
    )


def card(name: str, facts: str, *, bar: Sequence[Part] = (), rows: Rows | None = None) -> str:
    """Title, a line of facts, a bar and a table, each if there is one."""
    parts = [f"<div><b>{escape(name)}</b> <span>{escape(facts)}</span></div>"]
    if bar:
        parts.append(_bar(bar))
    if rows is not None:
        parts.append(_table(rows))
    look = "font-family:sans-serif;font-size:13px;line-height:1.5;max-width:760px"
    return f'<div style="{look}">{"".join(parts)}</div>'


def size_text(num_bytes: float) -> str:
    """Bytes in words."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.4g} {unit}"
    return f"{num_bytes:.0f} bytes"


def counted(count: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def waste_text(tokens: int, slots: int) -> str:
    """Share of ``slots`` without a token."""
    return f"{1 - tokens / slots:.1%}" if slots > 0 else "-"


def _bar(parts: Sequence[Part]) -> str:
    total = max(sum(part.amount for part in parts), 1)
    pieces, keys = [], []
    for part in parts:
        fill = "transparent" if part.color is None else part.color
        if part.striped:
            fill = _STRIPES.format(fill)
        share = 100 * part.amount / total
        pieces.append(f'<div style="width:{share:.3f}%;background:{fill}"></div>')
        box = f"display:inline-block;width:10px;height:10px;margin-right:4px;{_FRAME};background:{fill}"
        keys.append(
            f'<span style="margin-right:14px;white-space:nowrap"><span style="{box}"></span>'
            f"{part.amount:,} {escape(part.label)}</span>"
        )
    frame = f"display:flex;height:12px;margin:3px 0;{_FRAME};overflow:hidden"
    return f'<div style="{frame}">{"".join(pieces)}</div><div style="font-size:12px">{"".join(keys)}</div>'


def _table(rows: Rows) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        out = []
        for i, cell in enumerate(cells):
            align = "left" if i in rows.text_columns else "right"
            look = f"text-align:{align};padding:1px 14px 1px 0;{_LINE};background:transparent"
            out.append(f'<{tag} style="{look}">{escape(f"{cell:,}" if isinstance(cell, int) else str(cell))}</{tag}>')
        return f'<tr style="background:transparent">{"".join(out)}</tr>'

    if not rows.num_rows:
        return f'<div style="font-size:12px;opacity:.75">no {escape(rows.what)}</div>'
    body = "".join(line(cells, "td") for cells in rows.cells)
    left = rows.num_rows - len(rows.cells)
    more = f'<div style="font-size:12px;opacity:.75">... {left:,} more {escape(rows.what)}</div>' if left > 0 else ""
    look = "border-collapse:collapse;color:inherit;font-size:12px;margin:4px 0"
    return f'<table style="{look}">{line(rows.head, "th")}{body}</table>{more}'
