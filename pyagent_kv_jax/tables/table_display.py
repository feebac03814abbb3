"""How block tables show themselves. Reads the counts of the rows, and for a notebook the blocks of the first few."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.notebook_display import (
    EMPTY_COLOR,
    MOST_ROWS,
    USED_COLOR,
    Part,
    Rows,
    attempt,
    card,
    counted,
    fields_html,
    fields_line,
    values_of,
    waste_text,
)
from pyagent_kv_jax.tables.table_storage import TableStorage

_MOST_BLOCKS = 8


class RowCounts(NamedTuple):
    """Of the rows of a table that hold anything: i64[n] each."""

    rows: np.ndarray
    num_blocks: np.ndarray
    num_tokens: np.ndarray


def row_counts(table: TableStorage) -> RowCounts | None:
    """Read them, O(R); None where they have no values now, or are those of a whole batch of tables."""
    counts = values_of(table.num_blocks, table.num_tokens)
    if counts is None or any(count.ndim != 1 for count in counts):
        return None
    rows = np.flatnonzero((counts[0] > 0) | (counts[1] > 0))
    return RowCounts(rows, *(count[rows].astype(np.int64) for count in counts))


def table_line(table: TableStorage) -> str:
    """One line: sizes, and what the rows hold. Costs O(R)."""
    return attempt(lambda: _line(table), lambda: fields_line(table, _fields(table)))


def table_html(table: TableStorage) -> str:
    """For a notebook. Costs O(R), and reads the blocks of the first rows."""
    return attempt(lambda: _html(table), lambda: fields_html(table, _fields(table)))


def _fields(table: TableStorage) -> list[str]:
    return [field.name for field in dataclasses.fields(table) if field.name != "config"]


def _sizes(table: TableStorage) -> str:
    config = table.config
    return f"{counted(table.num_rows, 'row')} of up to {table.width} blocks of {config.block_size} tokens"


def _line(table: TableStorage) -> str:
    counts = row_counts(table)
    if counts is None:
        return fields_line(table, _fields(table))
    blocks, tokens = int(counts.num_blocks.sum()), int(counts.num_tokens.sum())
    held = f"{counted(len(counts.rows), 'row')} in use, {counted(blocks, 'block')}, {counted(tokens, 'token')}"
    return f"{type(table).__name__}({_sizes(table)}: {held})"


def _html(table: TableStorage) -> str:
    counts = row_counts(table)
    if counts is None:
        return fields_html(table, _fields(table))
    size, first = table.config.block_size, counts.rows[:MOST_ROWS]
    rows = np.full(MOST_ROWS, -1, np.int32)  # of one size always: one program for all tables of a kind
    rows[: len(first)] = first
    read = values_of(table.dense_rows(jnp.asarray(rows), min(_MOST_BLOCKS, table.width)))
    cells = []
    for i, row in enumerate(first.tolist()):
        blocks, tokens = int(counts.num_blocks[i]), int(counts.num_tokens[i])
        ids = "" if read is None else _ids(read[0][i][:blocks], blocks)
        cells.append((f"row {row}", tokens, blocks, waste_text(tokens, blocks * size), ids))
    slots, tokens = int(counts.num_blocks.sum()) * size, int(counts.num_tokens.sum())
    bar = [Part("slots hold a token", tokens, USED_COLOR), Part("slots are empty", slots - tokens, EMPTY_COLOR, True)]
    head = ("", "tokens", "blocks", "empty", "block ids")
    table_rows = Rows(head, cells, len(counts.rows), "rows in use", (0, 4))
    return card(type(table).__name__, _sizes(table), bar=bar if slots else (), rows=table_rows)


def _ids(ids: np.ndarray, num_blocks: int) -> str:
    texts = ["-" if block < 0 else str(block) for block in ids.tolist()]
    return ", ".join([*texts, *(["..."] if num_blocks > len(texts) else [])])
