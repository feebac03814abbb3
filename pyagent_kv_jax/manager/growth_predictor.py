"""How much further requests will grow, learned from those that have ended."""

from __future__ import annotations

from collections import deque

import numpy as np

_REMEMBERED = 1024  # requests; the latest
_FEWEST = 8  # that went further: from fewer nothing is concluded


class GrowthPredictor:
    """Remembers how far the latest requests grew, in whatever unit its user counts. Not thread-safe."""

    def __init__(self) -> None:
        self._ended: deque[int] = deque(maxlen=_REMEMBERED)
        self._sorted: np.ndarray | None = None  # of ``_ended``, made when next asked

    def learn(self, growth: int) -> None:
        """A request ended when it had grown by so much."""
        self._ended.append(growth)
        self._sorted = None

    def remaining(self, growth: np.ndarray) -> np.ndarray:
        """What requests that have grown by ``growth`` i64[n] still have before them, f64[n].

        Of the requests that went further, half grew by at least this much more; inf where too few did.
        """
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self._ended, np.int64, len(self._ended)))
        first = np.searchsorted(self._sorted, growth, side="right")  # those that went on from there
        alive = len(self._sorted) - first
        if not len(self._sorted):
            return np.full(len(growth), np.inf)
        median = self._sorted[np.minimum(first + alive // 2, len(self._sorted) - 1)]
        return np.where(alive < _FEWEST, np.inf, median - growth)
