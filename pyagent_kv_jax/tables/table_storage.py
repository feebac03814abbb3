"""What every form of a block table has: counts for each row, and a few operations on wherever its blocks stand.

All else (``rows.py``, ``slot_mapping.py``, ``row_methods.py``) is written once, on top of these operations.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple, Self, TypeVar

import jax
import numpy as np

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import KVCacheError

Table = TypeVar("Table", bound="TableStorage")


class Entries(NamedTuple):
    """Blocks to be written, in groups that are written whole or not at all.

    Entries of one row stand together, and their columns ascend.

    Attributes:
        rows: i32[n].
        columns: i32[n].
        block_ids: i32[n].
        groups: i32[n], ascending, below G; G for padding.
    """

    rows: jax.Array
    columns: jax.Array
    block_ids: jax.Array
    groups: jax.Array

    def in_groups(self, ok: jax.Array) -> jax.Array:
        """bool[n]: whether the entry's group is one of those in ``ok`` bool[G]."""
        return ok.at[self.groups].get(mode="fill", fill_value=False)


@dataclasses.dataclass(frozen=True, repr=False)
class TableStorage(abc.ABC):
    """R rows of up to W blocks. The operations take arguments that have been checked.

    Attributes:
        num_blocks: i32[R], columns of each row up to its last block.
        num_tokens: i32[R], tokens of each row.
        config: sizes, static.
    """

    num_blocks: jax.Array
    num_tokens: jax.Array
    config: BlockTableConfig

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_blocks.shape[0]

    @property
    def width(self) -> int:
        """W, the columns of a row."""
        return self.config.max_num_blocks_per_req

    @property
    def max_block_id(self) -> int:
        """The greatest block id of which every slot is at most 2**31 - 2, and so an int32, as are slots + 1."""
        return (2**31 - 1) // self.config.block_size - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the table."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @abc.abstractmethod
    def read_blocks(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Block ids at ``rows`` and ``columns`` (i32[...], inside the table); -1 where there is none."""

    @abc.abstractmethod
    def write_blocks(self, entries: Entries, ok: jax.Array) -> tuple[Self, jax.Array]:
        """Write the groups in ``ok`` bool[G]; (table, those of them that were written). Counts stay as they are.

        Groups are served in their order. Once one finds no room, later ones that need any are refused too.
        """

    @abc.abstractmethod
    def empty_rows(self, mask: jax.Array) -> Self:
        """Take all blocks out of the rows in ``mask`` bool[R]. Counts stay as they are."""

    @abc.abstractmethod
    def exchange_rows(self, target: jax.Array, source: jax.Array) -> Self:
        """Row ``target[i]`` gets the blocks that row ``source[i]`` had; together they are the same rows.

        ``target`` i32[M] is R for padding. Counts stay as they are.
        """

    @abc.abstractmethod
    def dense_rows(self, rows: jax.Array | None, max_blocks: int) -> jax.Array:
        """i32[B, max_blocks]: the first columns of ``rows`` i32[B], all -1 where there is no such row; None: of all."""

    @abc.abstractmethod
    def after_reading(self, read: jax.Array) -> Self:
        """The same, so that what is written from here on waits for ``read``, gathered from it (see ``in_place.py``)."""

    @abc.abstractmethod
    def no_room_error(self, rows: np.ndarray, columns: np.ndarray) -> KVCacheError | None:
        """The error for blocks in these columns, sorted, if there is no room for them. With plain values only."""
