"""Where in the tree of cached prefixes each block stands, for those who look at it: nothing is found by this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from pyagent_kv_jax.manager.prefix.block_hash import BlockKeys
from pyagent_kv_jax.manager.prefix.digest_map import WORDS


class Places(NamedTuple):
    """Of n blocks.

    Attributes:
        parents: u64[n], first word of the key of the block before; of a first block, that of the chain's root.
        columns: i64[n], blocks before it.
    """

    parents: np.ndarray
    columns: np.ndarray

    @classmethod
    def of_runs(cls, runs: Sequence[tuple[BlockKeys, int, int]], first_words: np.ndarray) -> Self:
        """Of the blocks ``first`` up to ``last`` of each (keys, first, last), whose keys begin with these u64[n]."""
        before = [keys.before(first) for keys, first, last in runs if first < last]
        firsts = np.array([first for _, first, last in runs if first < last], np.int64)
        step = WORDS
        if runs and runs[0][0].nodes is not None:  # digests of any length, see ``words_of``
            before, step = [digest[:8].ljust(8, b"\0") for digest in before], 1
        words = np.frombuffer(b"".join(before), np.uint64)[::step]
        if len(words) == len(first_words):  # one block each, as decode steps fill them
            return cls(words, firsts)
        lengths = np.array([last - first for _, first, last in runs if first < last], np.int64)
        starts = np.cumsum(lengths) - lengths
        parents = np.roll(first_words, 1)
        parents[starts] = words
        return cls(parents, np.arange(len(first_words)) - np.repeat(starts - firsts, lengths))

    def of(self, chosen: np.ndarray) -> Self:
        """Those chosen bool[n]."""
        return self._replace(parents=self.parents[chosen], columns=self.columns[chosen])


class ChainPlaces:
    """The places of all blocks, by block id, and how often each was hit. Of blocks that are not cached: no meaning."""

    def __init__(self, num_blocks: int) -> None:
        self.parents = np.zeros(num_blocks, np.uint64)
        self.columns = np.zeros(num_blocks, np.int32)
        self.hits = np.zeros(num_blocks, np.int32)

    def put(self, ids: np.ndarray, places: Places) -> None:
        """Blocks i32[n] have just been cached."""
        self.parents[ids], self.columns[ids], self.hits[ids] = places.parents, places.columns, 0

    def count_hits(self, ids: np.ndarray) -> None:
        """A request began with the blocks i32[n], none twice."""
        self.hits[ids] += 1

    def move(self, old: np.ndarray, new: np.ndarray) -> None:
        """What was block ``old[i]`` is block ``new[i]``; all at once."""
        for array in (self.parents, self.columns, self.hits):
            array[new] = array[old]


class CachedBlocks(NamedTuple):
    """The n blocks of one layer group that can be hit, ascending by id.

    A block's parent is the one whose key is its ``parents`` entry; where there is none, it is the first of its prefix
    (column 0), or what came before it has been evicted.

    Attributes:
        ids: i32[n].
        keys: u64[n], the first word of each key: a name, not a proof.
        parents: u64[n].
        columns: i32[n], blocks of the prefix before it.
        hits: i32[n], requests that began with it since it was cached.
    """

    ids: np.ndarray
    keys: np.ndarray
    parents: np.ndarray
    columns: np.ndarray
    hits: np.ndarray
