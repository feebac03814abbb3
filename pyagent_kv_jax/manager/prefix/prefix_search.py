"""What of a cached prefix the next token sees, and the search for the longest prefix a group can continue from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Reach(NamedTuple):
    """How far back a layer group's attention sees.

    Attributes:
        block_size: tokens a block.
        window: sliding window in tokens, the query's own among them; None: no window.
        chunk: chunk in tokens (a query sees its own chunk only); None: no chunks.
    """

    block_size: int
    window: int | None
    chunk: int | None

    @property
    def is_full(self) -> bool:
        """Whether every token before is seen."""
        return self.window is None and self.chunk is None

    def first_needed(self, num_blocks: int) -> int:
        """First block needed to continue a prefix of ``num_blocks`` blocks; ``num_blocks``: none is."""
        position = num_blocks * self.block_size  # of the next token
        first = 0 if self.window is None else max(0, position - self.window + 1)
        if self.chunk is not None:
            first = max(first, position // self.chunk * self.chunk)
        return first // self.block_size


class LocalSearch:
    """How long a prefix a window or chunk group can serve, asked for shorter and shorter ones.

    Blocks are looked up from the right, each at most once over all questions: a block that is missing though needed is
    needed by every longer prefix asked about too, so the next one to try ends just before it.
    """

    def __init__(self, reach: Reach, find: Callable[[int], int | None]) -> None:
        """``find``: from a block's index in the request to the cached block, or None."""
        self.found: dict[int, int] = {}
        self._reach = reach
        self._find = find
        self._known_from: int | None = None  # all blocks from here to the end of the last answer are found

    def longest(self, num_blocks: int) -> int:
        """The longest prefix of at most ``num_blocks`` blocks, which must not grow from call to call."""
        while True:
            first = self._reach.first_needed(num_blocks)
            index = num_blocks if self._known_from is None else min(num_blocks, self._known_from)
            while index > first and (block := self._find(index - 1)) is not None:
                index -= 1
                self.found[index] = block
            self._known_from = index
            if index <= first:
                return num_blocks
            num_blocks = index - 1
