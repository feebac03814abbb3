"""The same content in blocks of another size. A pure function on the host; it costs O(pool), like defragmentation.

Both sizes are whole numbers of units, the tokens of their greatest common divisor. A row's tokens are taken as a string
of units, which is cut anew into groups of one new block each. A group stays where it is if its units already are the
run that makes a block; so splitting moves nothing, and merging moves what does not stand in such runs.

    old blocks of 8    3 2 | 6 7 | 9          block 1 of 16 is blocks 2 and 3 of 8
    new blocks of 16   (3 2) is copied, (6 7) is block 3, (9 .) is copied: no block of 16 begins with block 9
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pyagent_kv_jax.cache.kv_pages import KVPages, clear_blocks_in_place, copy_blocks_in_place
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import ConfigError, InvalidBlockError, OutOfBlocksError, RequestTooLongError
from pyagent_kv_jax.tables.padding import padded


@dataclasses.dataclass(frozen=True)
class BlockSizeChange:
    """Tables over blocks of the new size, and what is to be copied for them.

    Attributes:
        tables: i32[rows, width], padding -1.
        num_blocks: i32[rows], columns of each row: those of its tokens.
        released: i32[rows], leading columns without a block.
        ref_counts: i32[num_blocks of the pool].
        copy_src: i32[n], pages to be copied within every layer, as if all reads came before all writes.
        copy_dst: i32[n], where to; no page twice.
        vacant: i32[m], pages of held blocks in which none of the rows' tokens stand.
    """

    tables: np.ndarray
    num_blocks: np.ndarray
    released: np.ndarray
    ref_counts: np.ndarray
    copy_src: np.ndarray
    copy_dst: np.ndarray
    vacant: np.ndarray

    def move(self, pages: KVPages, config: KVCacheConfig, *, zero: bool = False) -> KVPages:
        """``pages`` as those of ``config``, what is to be copied in its new place; then the old ones are donated.

        All is copied by one call, which takes as much memory besides. ``zero``: also clear the vacant pages, which
        other requests may have written.
        """
        pages = dataclasses.replace(pages, config=config.with_block_size(config.page_size))  # a block, a page
        if len(self.copy_src):
            pages = copy_blocks_in_place(pages, padded(self.copy_src), padded(self.copy_dst))
        if zero and len(self.vacant):
            pages = clear_blocks_in_place(pages, padded(self.vacant))
        return dataclasses.replace(pages, config=config)


def change_block_size(
    tables: np.ndarray,
    num_tokens: np.ndarray,
    ref_counts: np.ndarray,
    *,
    old_size: int,
    new_size: int,
    page_size: int,
    num_blocks: int,
    width: int,
    num_groups: int = 1,
) -> BlockSizeChange:
    """What becomes of rows of blocks when blocks have another size.

    Only columns of tokens go on: those reserved ahead are given back. A new block whose old ones are in part given back
    (left of a window) holds nothing there. Rows that share all of a new block go on sharing it; what they share in part
    each gets for itself. So does a row whose last block is now not full, but was: whoever shares it may write next. Of
    groups that could stay in the same run, that with most of its units there stays.

    Args:
        tables: i32[rows, columns], ids of old blocks; -1 where there is none.
        num_tokens: i32[rows].
        ref_counts: i32[old blocks], as many as ``tables`` names each.
        old_size: tokens of a block.
        new_size: tokens of a block from now on.
        page_size: tokens of a page; divides both sizes.
        num_blocks: new blocks in the pool.
        width: new columns of a row.
        num_groups: layer groups, whose rows stand one group after another; see ``GroupedRows``.

    Raises:
        ConfigError: a size that is no positive multiple of the page size.
        InvalidBlockError: references that no row holds, or not as many as rows name.
        RequestTooLongError: a row that is longer than its columns, or its new ones.
        OutOfBlocksError: more blocks are needed than the pool has.
    """
    _check(tables, num_tokens, ref_counts, (old_size, new_size), page_size, width)
    unit = math.gcd(old_size, new_size)
    columns = -(-num_tokens // new_size)
    row = np.repeat(np.arange(len(tables)), columns)
    column = np.arange(len(row)) - np.repeat(np.cumsum(columns) - columns, columns)
    units = _units(tables, -(-num_tokens // unit), row, column, old_size // unit, new_size // unit)
    is_open = (column == columns[row] - 1) & (num_tokens[row] % new_size != 0)  # the next token goes there
    held = (units >= 0).any(axis=1) | is_open
    row, column, units, is_open = row[held], column[held], units[held], is_open[held]
    owner = _owners(units, row, is_open, num_tokens % old_size == 0, num_groups)
    groups, which = np.unique(np.column_stack([units, owner]), axis=0, return_inverse=True)
    if len(groups) > num_blocks:
        raise OutOfBlocksError(
            f"block_size {new_size}: what {np.count_nonzero(ref_counts)} blocks of {old_size} tokens hold takes "
            f"{len(groups)} of {new_size}, want at most the {num_blocks} there are"
        )
    groups, which = groups[:, :-1], which.ravel()
    places = _places(groups, num_blocks)
    new_tables, released = np.full((len(tables), width), -1, np.int32), columns.astype(np.int32)
    new_tables[row, column] = places[which]
    np.minimum.at(released, row, column.astype(np.int32))
    target = places[:, None] * groups.shape[1] + np.arange(groups.shape[1])
    moved = (groups >= 0) & (groups != target)
    return BlockSizeChange(
        tables=new_tables,
        num_blocks=columns.astype(np.int32),
        released=released,
        ref_counts=np.bincount(places[which], minlength=num_blocks).astype(np.int32),
        copy_src=_pages(groups[moved], unit // page_size),
        copy_dst=_pages(target[moved], unit // page_size),
        vacant=_pages(target[groups < 0], unit // page_size),
    )


def _check(
    tables: np.ndarray,
    num_tokens: np.ndarray,
    ref_counts: np.ndarray,
    sizes: tuple[int, int],
    page_size: int,
    width: int,
) -> None:
    for size in sizes:
        if size <= 0 or size % page_size:
            raise ConfigError(f"block size: got {size}, want a positive multiple of the page size {page_size}")
    named = np.bincount(tables[tables >= 0], minlength=len(ref_counts))
    if len(named) > len(ref_counts) or (named != ref_counts).any():
        wrong = np.flatnonzero(named[: len(ref_counts)] != ref_counts)[:5]
        raise InvalidBlockError(
            f"blocks {wrong.tolist()}: got {ref_counts[wrong].tolist()} references, want {named[wrong].tolist()}, as "
            f"often as rows name them: those that others hold would be lost"
        )
    room = min(tables.shape[1] * sizes[0], width * sizes[1])
    if len(num_tokens) and num_tokens.max() > room:
        longest = int(num_tokens.argmax())
        raise RequestTooLongError(
            f"row {longest}: holds {num_tokens[longest]} tokens, want at most the {room} for which there are columns"
        )


def _units(
    tables: np.ndarray, num_units: np.ndarray, row: np.ndarray, column: np.ndarray, per_old: int, per_new: int
) -> np.ndarray:
    """i32[n, per_new]: the units of new ``column`` i64[n] of ``row`` i64[n]; -1 past the tokens, or where none is."""
    position = column[:, None] * per_new + np.arange(per_new)
    block = tables[row[:, None], np.minimum(position // per_old, tables.shape[1] - 1)]
    there = (block >= 0) & (position < num_units[row, None])
    return np.where(there, block * per_old + position % per_old, -1)


def _owners(
    units: np.ndarray, row: np.ndarray, is_open: np.ndarray, was_full: np.ndarray, num_groups: int
) -> np.ndarray:
    """i64[n]: rows may share a new block only if it has one owner. A full block has no owner, 0.

    Of an open one, requests that share it in every group are one owner, for a request that writes gets copies in all
    groups or none; those whose last block was full, or not there, are each their own.
    """
    num_requests = len(was_full) // num_groups
    last = np.full((num_requests, num_groups, units.shape[1]), -1, units.dtype)
    group, request = np.divmod(row[is_open], max(num_requests, 1))
    last[request, group] = units[is_open]
    _, alike = np.unique(last.reshape(num_requests, num_groups * units.shape[1]), axis=0, return_inverse=True)
    alone = was_full[:num_requests] | (last < 0).all(axis=(1, 2))
    owner_of = np.where(alone, num_requests + np.arange(num_requests), alike.ravel()) + 1
    owner = np.zeros(len(row), np.int64)
    owner[is_open] = owner_of[request] * num_groups + group
    return owner


def _places(groups: np.ndarray, num_blocks: int) -> np.ndarray:
    """i64[n]: the new block of each of ``groups`` i32[n, m]; see ``change_block_size``."""
    number, size = groups.shape
    run, offset = np.divmod(groups, size)  # of -1: run -1
    group, index = np.nonzero((offset == np.arange(size)) & (run >= 0) & (run < num_blocks))
    claims, units = np.unique(group * num_blocks + run[group, index], return_counts=True)
    group, run = np.divmod(claims[np.argsort(-units, kind="stable")], num_blocks)
    best = np.sort(np.unique(group, return_index=True)[1])  # of each group, the run with most of its units
    stays = best[np.unique(run[best], return_index=True)[1]]  # of each run, the group that has most there
    places = np.full(number, -1, np.int64)
    places[group[stays]] = run[stays]
    others = np.flatnonzero(places < 0)
    places[others] = np.setdiff1d(np.arange(num_blocks), run[stays], assume_unique=True)[: len(others)]
    return places


def _pages(units: np.ndarray, pages_per_unit: int) -> np.ndarray:
    """i32[n * pages_per_unit]: the pages of ``units`` i64[n]."""
    return (units[:, None] * pages_per_unit + np.arange(pages_per_unit)).astype(np.int32).ravel()
