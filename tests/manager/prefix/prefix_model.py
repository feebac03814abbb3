"""What a prefix cache must do, said token by token over one dictionary."""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, CacheExtras
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit


class Request:
    """A request as the model knows it, beside its keys."""

    def __init__(self, hasher: BlockHasher, salt: str | None, tokens: list[int]) -> None:
        self.salt, self.tokens, self.size = salt, tokens, hasher.block_size
        self.keys = hasher.start(CacheExtras(salt))
        self.keys.extend(np.array(tokens, np.int32))

    def __len__(self) -> int:
        return len(self.tokens) // self.size

    def content(self, index: int) -> object:
        return self.salt, self.tokens[: (index + 1) * self.size]


class Model:
    """One dictionary: (group, digest) -> (content, block). Everything else is asked by going through it."""

    def __init__(self, windows, chunks, size: int) -> None:
        self.windows, self.chunks, self.size = windows, chunks, size
        self.entries: dict[tuple[int, bytes], tuple[object, int]] = {}
        self.collisions = 0

    def block(self, group: int, request: Request, index: int) -> int:
        content, block = self.entries.get((group, request.keys.digests[index]), (None, -1))
        return block if content == request.content(index) else -1

    def needed(self, group: int, length: int) -> set[int]:
        """Blocks of which the token after ``length`` blocks sees something."""
        query, window, chunk = length * self.size, self.windows[group], self.chunks[group]
        seen = [
            token
            for token in range(query)
            if (window is None or query - token < window) and (chunk is None or token // chunk == query // chunk)
        ]
        return {token // self.size for token in seen}

    def serves(self, group: int, request: Request, length: int) -> bool:
        return all(self.block(group, request, index) >= 0 for index in self.needed(group, length))

    def lookup(self, request: Request, max_tokens: int) -> PrefixHit:
        groups = range(len(self.windows))
        allowed = min(max_tokens // self.size, len(request))
        length = max(n for n in range(allowed + 1) if all(self.serves(group, request, n) for group in groups))
        blocks = [
            [
                self.block(group, request, index) if index in self.needed(group, length) else -1
                for index in range(length)
            ]
            for group in groups
        ]
        lacking = [group for group in groups if length < allowed and not self.serves(group, request, length + 1)]
        limited_by = lacking[0] if 0 < len(lacking) < len(self.windows) else None
        return PrefixHit(length * self.size, np.array(blocks, np.int32).reshape(len(self.windows), length), limited_by)

    def insert(self, group: int, request: Request, index: int, block: int) -> bool:
        place = group, request.keys.digests[index]
        if block < 0 or block in self.ids():
            return False
        if place in self.entries:
            self.collisions += self.entries[place][0] != request.content(index)
            return False
        self.entries[place] = request.content(index), block
        return True

    def ids(self) -> set[int]:
        return {block for _, block in self.entries.values()}
