"""What a block table does, in plain Python: a list of blocks and a count of tokens for each row."""

from __future__ import annotations

import numpy as np


class TableModel:
    """Rows of blocks and tokens, and slots one token at a time."""

    def __init__(self, num_rows: int, width: int, block_size: int) -> None:
        self.width, self.block_size = width, block_size
        self.blocks: list[list[int]] = [[] for _ in range(num_rows)]
        self.tokens = [0] * num_rows

    def can_append(self, row: int, ids: list[int], tokens: int) -> bool:
        held = len(self.blocks[row]) + len(ids)
        room = held * self.block_size - self.tokens[row]
        return held <= self.width and all(b >= 0 for b in ids) and 0 <= tokens <= room

    def append(self, row: int, ids: list[int], tokens: int) -> bool:
        if not self.can_append(row, ids, tokens):
            return False
        self.blocks[row] = self.blocks[row] + ids
        self.tokens[row] += tokens
        return True

    def clear(self, row: int) -> None:
        self.blocks[row], self.tokens[row] = [], 0

    def reorder(self, dst: list[int], src: list[int]) -> None:
        old = [(self.blocks[r], self.tokens[r]) for r in src]
        for row, (blocks, tokens) in zip(dst, old, strict=True):
            self.blocks[row], self.tokens[row] = blocks, tokens

    def slot(self, row: int, position: int) -> int:
        if not (0 <= row < len(self.blocks) and 0 <= position < self.tokens[row]):
            return -1
        return self.blocks[row][position // self.block_size] * self.block_size + position % self.block_size

    def dense(self) -> np.ndarray:
        """i32[R, W], padding -1."""
        return np.array([row + [-1] * (self.width - len(row)) for row in self.blocks], np.int32)
