"""Which tokens requests consist of, as far as they are known: what the keys of their full blocks are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, BlockKeys, CacheExtras


@dataclasses.dataclass
class TokenRecord:
    """The tokens of a request that holds no row just now.

    Attributes:
        keys: of its full blocks.
        tail: i32[block_size], the tokens after the last full block, ``num_tokens % block_size`` of them.
        num_tokens: how many are known.
        may_read: whether it may be served from cached blocks.
        is_counted: whether the hit rate knows it.
    """

    keys: BlockKeys
    tail: np.ndarray
    num_tokens: int
    may_read: bool
    is_counted: bool = False

    @classmethod
    def of_prompt(cls, hasher: BlockHasher, tokens: np.ndarray, extras: CacheExtras, may_read: bool) -> TokenRecord:
        """Hash the full blocks of ``tokens`` i32[n]."""
        size = hasher.block_size
        full = len(tokens) // size * size
        keys = hasher.start(extras)
        keys.extend(tokens[:full])
        tail = np.zeros(size, np.int32)
        tail[: len(tokens) - full] = tokens[full:]
        return cls(keys, tail, len(tokens), may_read)

    def rehashed(self, hasher: BlockHasher) -> TokenRecord:
        """The same tokens in blocks of another size."""
        tail = self.tail[: self.num_tokens % self.keys.hasher.block_size]
        tokens = np.concatenate([self.keys.tokens(), tail])
        new = TokenRecord.of_prompt(hasher, tokens, self.keys.extras, self.may_read)
        return dataclasses.replace(new, is_counted=self.is_counted)

    def copy(self) -> TokenRecord:
        """For a fork."""
        return dataclasses.replace(self, keys=self.keys.copy(), tail=self.tail.copy(), is_counted=True)


class FullBlocks(NamedTuple):
    """Full blocks of n requests of a batch, to be entered into the prefix cache.

    Attributes:
        at: i64[n], where in the batch each request is.
        rows: i32[n].
        keys: of each.
        first: i64[n], its first column.
        last: i64[n], the column after its last.
    """

    at: np.ndarray
    rows: np.ndarray
    keys: list[BlockKeys]
    first: np.ndarray
    last: np.ndarray

    def of(self, chosen: np.ndarray) -> Self:
        """Those of the requests of the batch that are ``chosen`` bool[...]."""
        kept = np.flatnonzero(chosen[self.at])
        keys = [self.keys[i] for i in kept.tolist()]
        return self._replace(
            at=self.at[kept], rows=self.rows[kept], keys=keys, first=self.first[kept], last=self.last[kept]
        )

    def and_those_of(self, requests: Sequence[tuple[int, int, BlockKeys, int, int]]) -> FullBlocks:
        """With more requests: (where in the batch, row, keys, first column, column after the last full one)."""
        more = [
            (at, row, keys, first, min(last, len(keys)))
            for at, row, keys, first, last in requests
            if first < min(last, len(keys))
        ]
        if not more:
            return self
        at, rows, keys, first, last = zip(*more, strict=True)
        return FullBlocks(
            np.concatenate([self.at, at]),
            np.concatenate([self.rows, rows]),
            [*self.keys, *keys],
            np.concatenate([self.first, first]),
            np.concatenate([self.last, last]),
        )

    def runs(self) -> list[tuple[BlockKeys, int, int]]:
        """(keys, first, last) of each request."""
        return list(zip(self.keys, self.first.tolist(), self.last.tolist(), strict=True))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Block by block: where in the batch its request is, and its column; i64[m] each."""
        lengths = self.last - self.first
        if (lengths == 1).all():
            return self.at, self.first
        starts = np.cumsum(lengths) - lengths
        return np.repeat(self.at, lengths), np.arange(lengths.sum()) + np.repeat(self.first - starts, lengths)

    def rows_of_entries(self) -> np.ndarray:
        """i32[m]: the row of each block's request."""
        return np.repeat(self.rows, self.last - self.first)


class KnownTokens:
    """The same for all rows together, so that a decode step is a few numpy operations.

    A block's key is made once, when its last token becomes known.
    """

    def __init__(self, block_size: int, num_rows: int) -> None:
        self._block_size = block_size
        self._records: list[TokenRecord | None] = [None] * num_rows
        self._tail = np.zeros((num_rows, block_size), np.int32)
        self._num_tokens = np.full(num_rows, -1, np.int64)  # -1: the tokens of this row are nobody's business
        self._num_keys = np.zeros(num_rows, np.int64)
        self._columns_entered = np.zeros(num_rows, np.int64)

    def place(self, row: int, record: TokenRecord, columns_entered: int) -> None:
        """``record`` has ``row`` from now on; its first columns are already in the prefix cache."""
        self._records[row] = record
        self._tail[row] = record.tail
        self._num_tokens[row] = record.num_tokens
        self._num_keys[row] = len(record.keys)
        self._columns_entered[row] = columns_entered

    def rehashed(self, hasher: BlockHasher) -> KnownTokens:
        """The same tokens in blocks of another size, of which none has been entered into a prefix cache."""
        new = KnownTokens(hasher.block_size, len(self._records))
        for row in range(len(self._records)):
            if (record := self.record_of(row)) is not None:
                new.place(row, record.rehashed(hasher), 0)
        return new

    def take(self, row: int) -> TokenRecord | None:
        """The record of ``row``, which has none afterwards."""
        record = self.record_of(row)
        self._records[row] = None
        self._num_tokens[row] = -1
        self._num_keys[row] = 0
        return record

    def record_of(self, row: int) -> TokenRecord | None:
        """The record of ``row``, up to date."""
        record = self._records[row]
        if record is not None:
            record.tail, record.num_tokens = self._tail[row].copy(), int(self._num_tokens[row])
        return record

    def columns_entered(self, row: int) -> int:
        """How many of the row's columns have been entered into the prefix cache."""
        return int(self._columns_entered[row])

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """One more token ``tokens`` i32[n] for each of ``rows`` i32[n], no row twice."""
        at = self._num_tokens[rows]
        if (at < 0).any():
            rows, tokens, at = rows[at >= 0], tokens[at >= 0], at[at >= 0]
        self._tail[rows, at % self._block_size] = tokens
        self._num_tokens[rows] = at + 1
        for row in rows[(at + 1) % self._block_size == 0]:
            self._add_keys(row, self._tail[row])

    def append_run(self, row: int, tokens: np.ndarray) -> None:
        """Several more tokens i32[m] of one row."""
        at, size = int(self._num_tokens[row]), self._block_size
        if at < 0:
            return
        known = np.concatenate([self._tail[row, : at % size], tokens])
        full = len(known) // size * size
        if full:
            self._add_keys(row, known[:full])
        self._tail[row, : len(known) - full] = known[full:]
        self._num_tokens[row] = at + len(tokens)

    def newly_full(self, rows: np.ndarray, lengths: np.ndarray) -> FullBlocks:
        """Blocks that are complete once ``rows`` i32[n] hold ``lengths`` i64[n] tokens, and are not yet entered."""
        columns = np.minimum(lengths // self._block_size, self._num_keys[rows])
        entered = self._columns_entered[rows]
        found = np.flatnonzero(columns > entered)  # rows of unknown tokens have no keys
        filled = rows[found]
        keys = [record.keys for row in filled.tolist() if (record := self._records[row]) is not None]
        return FullBlocks(found, filled, keys, entered[found], columns[found])

    def enter(self, full: FullBlocks) -> None:
        """From now on these count as entered."""
        self._columns_entered[full.rows] = full.last

    def _add_keys(self, row: int, tokens: np.ndarray) -> None:
        record = self._records[row]
        assert record is not None
        record.keys.extend(tokens)
        self._num_keys[row] = len(record.keys)
