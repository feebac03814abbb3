"""Why a table refuses blocks: the error that a method called with plain values raises."""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.errors import InvalidArgumentError, InvalidBlockError, KVCacheError, RequestTooLongError
from pyagent_kv_jax.tables.block_ids import NO_BLOCK
from pyagent_kv_jax.tables.table_storage import TableStorage


def raise_if(error: KVCacheError | None) -> None:
    """Raise it, if there is one."""
    if error is not None:
        raise error


def why_not_appended(table: TableStorage, row: int, ids: np.ndarray, num_tokens: int) -> KVCacheError | None:
    """The error for appending blocks ``ids`` to a row, padding left out; None where there is nothing wrong."""
    ids = ids[: np.max(np.nonzero(ids != NO_BLOCK)[0], initial=-1) + 1]
    return _wrong_ids(table, ids) or why_not_extended(table, row, len(ids), num_tokens)


def why_not_extended(table: TableStorage, row: int, num_blocks: int, num_tokens: int) -> KVCacheError | None:
    """The error for appending so many blocks, and tokens, to a row; None where there is nothing wrong."""
    held_blocks, held_tokens = (int(np.asarray(held)[row]) for held in (table.num_blocks, table.num_tokens))
    total = held_blocks + num_blocks
    if num_tokens < 0:
        return InvalidArgumentError(f"num_tokens: got {num_tokens}, want 0 or more")
    if total > table.width:
        return RequestTooLongError(
            f"row {row}: got {num_blocks} more blocks, want at most {table.width - held_blocks}"
            f" ({held_blocks} of its {table.width} columns are taken)"
        )
    room = total * table.config.block_size - held_tokens
    if num_tokens > room:
        return InvalidArgumentError(
            f"num_tokens: got {num_tokens} for row {row}, want at most {room},"
            f" what its {total} blocks of {table.config.block_size} tokens have room for"
        )
    return table.no_room_error(np.full(num_blocks, row), np.arange(held_blocks, total))


def why_not_set(table: TableStorage, rows: np.ndarray, columns: np.ndarray, ids: np.ndarray) -> KVCacheError | None:
    """The error for putting blocks ``ids`` there, padding left out; None where there is nothing wrong."""
    if not len(rows):
        return None
    outside, beyond = (rows < 0) | (rows >= table.num_rows), columns >= table.width
    if outside.any():
        return InvalidArgumentError(f"rows: got {rows[outside][0]}, want a row in [0, {table.num_rows})")
    if columns.min() < 0:
        return InvalidArgumentError(f"columns: got {columns.min()}, want 0 or more")
    if beyond.any():
        row, column = rows[beyond][0], columns[beyond][0]
        return RequestTooLongError(f"row {row}: got column {column}, want one of its {table.width} columns")
    if error := _wrong_ids(table, ids):
        return error
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    twice = np.flatnonzero((rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1]))
    if twice.size:
        row, column = rows[twice[0]], columns[twice[0]]
        return InvalidArgumentError(f"columns: got {column} of row {row} twice, want no column of a row twice")
    return table.no_room_error(rows, columns)


def _wrong_ids(table: TableStorage, ids: np.ndarray) -> KVCacheError | None:
    wrong = ids[(ids < 0) | (ids > table.max_block_id)]
    if not wrong.size:
        return None
    return InvalidBlockError(f"block_ids: got {wrong[0]}, want 0 to {table.max_block_id}, so that slots fit int32")
