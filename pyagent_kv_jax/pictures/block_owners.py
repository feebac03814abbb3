"""Who holds which block now, read from any of our objects into plain arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.tables.row_methods import RowMethods


class BlockOwners(NamedTuple):
    """Of N blocks and the n owners that hold any.

    Attributes:
        block_size: tokens of a block; None: not known, for there is no table.
        names: of the owners.
        num_tokens: i64[n], tokens of each owner.
        num_columns: i64[n], blocks of each owner, over all layer groups.
        owner: i32[N], the first owner of each block; -1: nobody's, or nobody knows.
        references: i32[N], how many hold it.
        tokens: i32[N], tokens in it.
        cached: bool[N], whether its content is kept for others.
        group: i32[N], layer group it is held for; -1: for none.
        num_groups: G.
    """

    block_size: int | None
    names: tuple[str, ...]
    num_tokens: np.ndarray
    num_columns: np.ndarray
    owner: np.ndarray
    references: np.ndarray
    tokens: np.ndarray
    cached: np.ndarray
    group: np.ndarray
    num_groups: int

    @property
    def held(self) -> np.ndarray:
        """bool[N]: somebody holds it."""
        return self.references > 0

    @property
    def shared(self) -> np.ndarray:
        """bool[N]: more than one hold it."""
        return self.references > 1

    @property
    def set_aside(self) -> np.ndarray:
        """bool[N]: held by an owner, but without a token yet."""
        return self.held & (self.tokens == 0) & (self.owner >= 0)

    @property
    def cached_free(self) -> np.ndarray:
        """bool[N]: nobody holds it, and its content is kept until somebody needs the block."""
        return ~self.held & self.cached

    @property
    def free(self) -> np.ndarray:
        """bool[N]: nobody holds it, and there is nothing in it."""
        return ~self.held & ~self.cached


def block_owners(of: Any, table: Any = None, names: Sequence[str] | None = None) -> BlockOwners:
    """Read everything once; costs O(pool).

    Args:
        of: a ``KVCacheManager``, a ``PagedKVCache``, or a ``BlockPool``.
        table: of a ``BlockPool``: the ``BlockTable`` or ``SparseBlockTable`` whose rows hold its blocks. None: the
            blocks in use have unknown owners.
        names: of the table's rows. None: "row 0", "row 1", ... A manager's requests have names.

    Raises:
        InvalidArgumentError: another object, traced arrays, a table with something that has its own, fewer names than
            rows that hold blocks, or a block that the pool does not have.
    """
    if isinstance(of, KVCacheManager):
        _refuse("table", table, "a manager has its own")
        _refuse("names", names, "a manager's requests have names")
        seen = of.snapshot()
        return _owners(
            seen.config.block_size, seen.request_ids, seen.num_tokens, seen.block_tables, seen.references, seen.cached
        )
    if isinstance(of, PagedKVCache):
        _refuse("table", table, "a cache has its own")
        of, table = of.pool, of.table
    if not isinstance(of, BlockPool) or not (table is None or isinstance(table, RowMethods)):
        got = type(of).__name__ if table is None else f"{type(of).__name__} with {type(table).__name__}"
        raise InvalidArgumentError(
            f"block owners: got {got}, want a KVCacheManager, a PagedKVCache, or a BlockPool with or without its table"
        )
    try:
        references, cached = np.asarray(of.ref_counts), np.asarray(of.cached)
        if table is None:
            none = np.zeros((1, 0, 0), np.int32)
            return _owners(None, (), np.zeros(0, np.int64), none, references, cached)
        blocks, tokens = np.asarray(table.dense_rows(None, table.width)), np.asarray(table.num_tokens)
    except Exception as error:  # JAX has several for arrays without values
        raise InvalidArgumentError(f"block owners: got arrays without values ({type(error).__name__})") from error
    rows = np.flatnonzero((blocks >= 0).any(axis=1))
    if names is not None and len(rows) and len(names) <= rows[-1]:
        raise InvalidArgumentError(f"names: got {len(names)}, want at least {rows[-1] + 1}, one for each row in use")
    named = tuple(f"row {row}" if names is None else names[row] for row in rows.tolist())
    return _owners(table.config.block_size, named, tokens[rows], blocks[None, rows], references, cached)


def _owners(
    block_size: int | None,
    names: tuple[str, ...],
    num_tokens: np.ndarray,
    tables: np.ndarray,
    references: np.ndarray,
    cached: np.ndarray,
) -> BlockOwners:
    num_groups, size = len(tables), len(references)
    group_of, owner_of, column = np.nonzero(tables >= 0)
    blocks = tables[group_of, owner_of, column]
    if len(blocks) and blocks.max() >= size:
        raise InvalidArgumentError(f"table: got block {blocks.max()}, want those of a pool of {size}")
    owner, group, tokens = np.full(size, len(names), np.int32), np.full(size, -1, np.int32), np.zeros(size, np.int32)
    np.minimum.at(owner, blocks, owner_of.astype(np.int32))
    group[blocks] = group_of
    if block_size is not None:
        filled = np.clip(np.asarray(num_tokens)[owner_of] - column * block_size, 0, block_size)
        np.maximum.at(tokens, blocks, filled.astype(np.int32))
    owner[owner == len(names)] = -1
    columns = np.bincount(owner_of, minlength=len(names)).astype(np.int64)
    return BlockOwners(
        block_size, names, np.asarray(num_tokens), columns, owner, references, tokens, cached, group, num_groups
    )


def _refuse(name: str, value: object, why: str) -> None:
    if value is not None:
        raise InvalidArgumentError(f"{name}: got {type(value).__name__}, want none: {why}")
