"""What a block table does, in plain Python: a list of blocks and a count of tokens for each row."""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheError,
    RequestTooLongError,
    TableFullError,
)

Refusal = type[KVCacheError] | None


class TableModel:
    """Rows of blocks and tokens, and slots one token at a time. A column never set, left of one that was, is -1.

    ``fan_out`` and ``num_nodes``: of a sparse table, which refuses what would need more nodes; None: of a dense one.
    """

    def __init__(
        self, num_rows: int, width: int, block_size: int, fan_out: int | None = None, num_nodes: int = 0
    ) -> None:
        self.width, self.block_size, self.num_nodes = width, block_size, num_nodes
        self.num_ids = (2**31 - 1) // block_size  # whose slots fit int32, and slots + 1
        self.spans = [] if fan_out is None else [fan_out]  # columns that a node stands for, by level
        while fan_out is not None and self.spans[-1] < width:
            self.spans.append(self.spans[-1] * fan_out)
        self.blocks: list[list[int]] = [[] for _ in range(num_rows)]
        self.tokens = [0] * num_rows

    def has_row(self, row: int) -> bool:
        return 0 <= row < len(self.blocks)

    def nodes(self, row: int, more: list[int] = ()) -> set[tuple[int, int]]:
        """The nodes of a row, also when it gets ``more`` columns."""
        columns = [c for c, block in enumerate(self.blocks[row]) if block >= 0] + list(more)
        return {(span, c // span) for span in self.spans for c in columns}

    def lacking(self, row: int, more: list[int]) -> int:
        return len(self.nodes(row, more)) - len(self.nodes(row))

    def num_free_nodes(self) -> int:
        return self.num_nodes - sum(len(self.nodes(row)) for row in range(len(self.blocks)))

    def new_columns(self, row: int, ids: list[int]) -> list[int]:
        return list(range(len(self.blocks[row]), len(self.blocks[row]) + len(ids)))

    def why_not_append(self, row: int, ids: list[int], tokens: int, free_nodes: int | None = None) -> Refusal:
        """The error for it; None where it is right."""
        if not self.has_row(row):
            return InvalidArgumentError
        total = len(self.blocks[row]) + len(ids)
        if not all(0 <= block < self.num_ids for block in ids):
            return InvalidBlockError
        if total > self.width:
            return InvalidArgumentError if tokens < 0 else RequestTooLongError
        if not 0 <= tokens <= total * self.block_size - self.tokens[row]:
            return InvalidArgumentError
        wanted = self.lacking(row, self.new_columns(row, ids))
        free_nodes = self.num_free_nodes() if free_nodes is None else free_nodes
        return TableFullError if wanted and wanted > free_nodes else None

    def append(self, row: int, ids: list[int], tokens: int) -> None:
        self.blocks[row] = self.blocks[row] + ids
        self.tokens[row] += tokens

    def why_not_set(self, entries: list[tuple[int, int, int]]) -> Refusal:
        """The error for setting (row, column, block) all at once; None where it is right."""
        places = [(row, column) for row, column, _ in entries]
        if not all(self.has_row(row) for row, _ in places) or any(column < 0 for _, column in places):
            return InvalidArgumentError
        if any(column >= self.width for _, column in places):
            return RequestTooLongError
        if not all(0 <= block < self.num_ids for *_, block in entries):
            return InvalidBlockError
        if len(set(places)) < len(places):
            return InvalidArgumentError
        wanted = sum(self.lacking(row, [c for r, c in places if r == row]) for row in {row for row, _ in places})
        return TableFullError if wanted > self.num_free_nodes() else None

    def set(self, row: int, column: int, block: int) -> None:
        missing = column + 1 - len(self.blocks[row])
        self.blocks[row] = self.blocks[row] + [-1] * missing
        self.blocks[row][column] = block
        self.tokens[row] = max(self.tokens[row], (column + 1) * self.block_size)

    def clear(self, row: int) -> None:
        self.blocks[row], self.tokens[row] = [], 0

    def reorder(self, dst: list[int], src: list[int]) -> None:
        old = [(self.blocks[r], self.tokens[r]) for r in src]
        for row, (blocks, tokens) in zip(dst, old, strict=True):
            self.blocks[row], self.tokens[row] = blocks, tokens

    def block(self, row: int, column: int) -> int:
        return self.blocks[row][column] if self.has_row(row) and 0 <= column < len(self.blocks[row]) else -1

    def slot(self, row: int, position: int) -> int:
        if not (self.has_row(row) and 0 <= position < self.tokens[row]):
            return -1
        block = self.blocks[row][position // self.block_size]
        return -1 if block < 0 else block * self.block_size + position % self.block_size

    def dense(self, rows: list[int] | None = None, columns: int | None = None) -> np.ndarray:
        """i32[B, columns], padding -1."""
        rows, columns = range(len(self.blocks)) if rows is None else rows, columns or self.width
        return np.array([[self.block(row, column) for column in range(columns)] for row in rows], np.int32)

    def kernel_blocks(self, rows: list[int], columns: int, pieces: int) -> np.ndarray:
        """i32[B, columns * pieces]: each block as so many kernel blocks."""
        blocks = np.repeat(self.dense(rows, columns), pieces, axis=1)
        return np.where(blocks < 0, -1, blocks * pieces + np.arange(columns * pieces) % pieces)
