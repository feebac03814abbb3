"""A cache as plain as can be: float64 lists of tokens, attention one query at a time."""

from __future__ import annotations

import numpy as np


class DenseReference:
    """K and V of one layer and row after row, and causal attention over them."""

    def __init__(self, num_rows: int) -> None:
        self.k: list[list[np.ndarray]] = [[] for _ in range(num_rows)]
        self.v: list[list[np.ndarray]] = [[] for _ in range(num_rows)]

    def attend(self, row: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None) -> np.ndarray:
        """Append k, v [n, kv_heads, d] to ``row``; attend with q [n, q_heads, d]."""
        out = np.zeros((len(q), q.shape[1], v.shape[2]))
        for i in range(len(q)):
            self.k[row].append(k[i].astype(np.float64))
            self.v[row].append(v[i].astype(np.float64))
            start = 0 if window is None else max(0, len(self.k[row]) - window)
            keys, values = np.stack(self.k[row][start:]), np.stack(self.v[row][start:])
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[1])
                logits = keys[:, kv_head] @ q[i, head].astype(np.float64) / np.sqrt(q.shape[2])
                weights = np.exp(logits - logits.max())
                out[i, head] = weights @ values[:, kv_head] / weights.sum()
        return out

    def clear(self, row: int) -> None:
        self.k[row], self.v[row] = [], []
