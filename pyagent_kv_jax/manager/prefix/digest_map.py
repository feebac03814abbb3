"""Digest -> block, as arrays: a whole batch of requests is looked up or entered in a few numpy operations.

Open addressing with linear probing. A place holds a block id, or was never used since the map was made; digests lie
beside the blocks they belong to. A removed block leaves a mark where others may have been put behind it; when blocks
and marks fill half of the map, it is made anew.
"""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.errors import InvalidBlockError
from pyagent_kv_jax.tables.padding import power_of_two

WORDS = 4  # of 64 bits: a SHA-256 digest

FEW = 512  # digests; so many are claimed one by one

_NEVER_USED, _REMOVED = -1, -2


class DigestMap:
    """At most one digest a block and one block a digest. Not thread-safe.

    Digests are ``u64[n, WORDS]``, block ids ``i32[n]`` within 0 .. num_blocks - 1, places ``i64[n]``.
    """

    def __init__(self, num_blocks: int) -> None:
        self._claimed = num_blocks  # stands in a place between ``claim`` and ``fill``
        self._mask = max(power_of_two(4 * num_blocks), 64) - 1
        self._digests = np.zeros((num_blocks + 2, WORDS), np.uint64)  # room for -1, -2 and num_blocks to read from
        self._claimant = np.zeros(self._mask + 1, np.int64)
        self.clear()

    def __len__(self) -> int:
        return self._size

    def clear(self) -> None:
        """Empty it."""
        self._size = self._num_used = 0
        self._block_at = np.full(self._mask + 1, _NEVER_USED, np.int32)
        self._place_of = np.full(self._claimed, -1, np.int64)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """i32[n]: the block of each digest; -1: none."""
        found = np.full(len(digests), -1, np.int32)
        left, places = np.arange(len(digests)), self._home(digests)
        while len(left):
            blocks = self._block_at[places]
            equal = (blocks >= 0) & _equal(self._digests[blocks], digests[left])
            found[left[equal]] = blocks[equal]
            on = np.flatnonzero(~equal & (blocks != _NEVER_USED))
            left, places = left[on], (places[on] + 1) & self._mask
        return found

    def claim(self, digests: np.ndarray) -> np.ndarray:
        """Places for digests to come, each to be given to ``fill`` or ``release`` before anything else is asked.

        Returns:
            i64[n]; -1 where the digest is here already, or came before in ``digests``.
        """
        if self._num_used + len(digests) > self._mask // 2:
            self._rebuild()
        claimed = self._claim_few(digests) if len(digests) <= FEW else self._claim_many(digests)
        self._num_used += int(np.count_nonzero(claimed >= 0))
        return claimed

    def _claim_few(self, digests: np.ndarray) -> np.ndarray:
        """One by one: some 0.7 us each, where the numpy calls of ``_claim_many`` cost some 400 us together."""
        claimed: list[int] = []
        mine: dict[int, int] = {}  # place -> which of the digests
        block_at, first_word = self._block_at, self._digests[:, 0]
        for i, (place, word) in enumerate(zip(self._home(digests).tolist(), digests[:, 0].tolist(), strict=True)):
            while (block := block_at.item(place)) != _NEVER_USED:
                if block == self._claimed:
                    is_here = place in mine and np.array_equal(digests[mine[place]], digests[i])
                else:
                    is_here = (
                        block >= 0
                        and first_word.item(block) == word
                        and np.array_equal(self._digests[block], digests[i])
                    )
                if is_here:
                    place = -1
                    break
                place = (place + 1) & self._mask
            claimed.append(place)
            if place >= 0:
                block_at[place], mine[place] = self._claimed, i
        return np.array(claimed, np.int64)

    def _claim_many(self, digests: np.ndarray) -> np.ndarray:
        claimed = np.full(len(digests), -1, np.int64)
        left, places = np.arange(len(digests)), self._home(digests)
        while len(left):
            blocks = self._block_at[places]
            # Several may want one place. The first shall have it, so it is written last.
            self._claimant[places[::-1]] = left[::-1]
            first = self._claimant[places]
            won = (blocks == _NEVER_USED) & (first == left)
            winners, on = np.flatnonzero(won), np.flatnonzero(~won)
            claimed[left[winners]] = places[winners]
            self._block_at[places[winners]] = self._claimed
            left, places, blocks, first = left[on], places[on], blocks[on], first[on]
            own = digests[left]
            here = (blocks >= 0) & _equal(self._digests[blocks], own)
            on = np.flatnonzero(~(here | ((first != left) & _equal(digests[first], own))))
            left, places = left[on], (places[on] + 1) & self._mask
        return claimed

    def fill(self, places: np.ndarray, digests: np.ndarray, blocks: np.ndarray) -> None:
        """Put ``blocks``, none of which has a digest yet, into claimed places."""
        self._digests[blocks] = digests
        self._block_at[places] = blocks
        self._place_of[blocks] = places
        self._size += len(blocks)

    def release(self, places: np.ndarray) -> None:
        """Give claimed places back. Where nothing can have been put behind them, they were as good as never used."""
        is_end = self._block_at[(places + 1) & self._mask] == _NEVER_USED
        self._block_at[places] = np.where(is_end, _NEVER_USED, _REMOVED)
        self._num_used -= int(np.count_nonzero(is_end))

    def remove(self, blocks: np.ndarray) -> None:
        """Take out blocks that have a digest, none twice."""
        self.release(self._place_of[blocks])
        self._place_of[blocks] = -1
        self._size -= len(blocks)

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """What was block ``old[i]``, and had a digest, is block ``new[i]``; all at once."""
        places, digests = self._place_of[old], self._digests[old]
        self._place_of[old] = -1
        self._block_at[places], self._place_of[new], self._digests[new] = new, places, digests

    def blocks(self) -> np.ndarray:
        """i32[n]: all blocks that have a digest, ascending."""
        return np.flatnonzero(self._place_of >= 0).astype(np.int32)

    def digests_of(self, blocks: np.ndarray) -> np.ndarray:
        """The digests of blocks that have one."""
        return self._digests[blocks]

    def check(self) -> None:
        """Raise ``InvalidBlockError`` where places and blocks contradict each other, or a digest can't be found."""
        blocks = self.blocks()
        named = np.sort(self._block_at[self._block_at >= 0])
        if not np.array_equal(named, blocks) or len(blocks) != self._size:
            wrong = sorted(set(named.tolist()) ^ set(blocks.tolist()))
            raise InvalidBlockError(f"blocks {wrong[:8]}: their places say otherwise")
        lost = blocks[(self._block_at[self._place_of[blocks]] != blocks) | (self.find(self._digests[blocks]) != blocks)]
        if len(lost):
            raise InvalidBlockError(f"blocks {lost[:8].tolist()}: can't be found by their digests")

    def _home(self, digests: np.ndarray) -> np.ndarray:
        return (digests[:, 0] & np.uint64(self._mask)).astype(np.int64)

    def _rebuild(self) -> None:
        blocks = self.blocks()
        self.clear()
        digests = self._digests[blocks]
        self.fill(self.claim(digests), digests, blocks)


def _equal(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    same = some[:, 0] == others[:, 0]
    for word in range(1, WORDS):
        same &= some[:, word] == others[:, word]
    return same
