"""A block table whose memory follows the blocks in use: a radix tree for each row, as a CPU keeps its page tables."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pyagent_kv_jax.arguments import is_count
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import ConfigError, KVCacheError, TableFullError, is_concrete, require
from pyagent_kv_jax.tables.block_table import BlockTable
from pyagent_kv_jax.tables.in_place import after, erase_rows
from pyagent_kv_jax.tables.padding import padded, power_of_two
from pyagent_kv_jax.tables.refusals import raise_if
from pyagent_kv_jax.tables.row_methods import RowMethods
from pyagent_kv_jax.tables.table_storage import Entries

_DEFAULT_SHARE, _FEWEST_OF_A_ROW = 64, 32
_NODES_ERASED_TOGETHER = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["nodes", "roots", "owner", "free_nodes", "num_free_nodes", "num_blocks", "num_tokens"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class SparseBlockTable(RowMethods):
    """R rows of up to W blocks, with places for as many as are in use, in nodes of F = ``fan_out``.

    All that ``BlockTable`` does, by the same methods and functions. A row is a tree of depth D, the least with
    F**D >= W: the digits of a column in base F lead from the row's root through its nodes; a leaf holds block ids.
    Nodes are taken when a block first needs them, and come back when their row is cleared; a table without enough
    free nodes refuses (``TableFullError``, or ``ok`` false) and stays as it was.

    Attributes:
        nodes: i32[N, F], the nodes below, or the block ids in a leaf; -1 where there is none.
        roots: i32[R], the topmost node of each row; -1 for an empty one.
        owner: i32[N], the row each node belongs to; -1 for a free one.
        free_nodes: i32[N], a stack: the first ``num_free_nodes`` are the free nodes, what follows is of no meaning.
        num_free_nodes: i32[].
        num_blocks: i32[R], columns of each row up to its last block.
        num_tokens: i32[R], tokens of each row.
        config: sizes, static.
    """

    nodes: jax.Array
    roots: jax.Array
    owner: jax.Array
    free_nodes: jax.Array
    num_free_nodes: jax.Array

    @classmethod
    def create(cls, config: BlockTableConfig, num_blocks: int | None = None, fan_out: int | None = None) -> Self:
        """A table of ``config.max_num_reqs`` empty rows of ``config.max_num_blocks_per_req`` columns.

        Args:
            config: sizes.
            num_blocks: rows without holes that hold this many blocks together always fit, however they share them; a
                block of two rows counts twice. None: a 64th of the columns of all rows, but not less than 32
                blocks of each row or than one full row.
            fan_out: F, 2 to 1,024. None: the least power of two that makes trees of two levels, from 16 to 256.

        Raises:
            ConfigError: a count of blocks that is not positive, or another fan-out.
        """
        rows, width = config.max_num_reqs, config.max_num_blocks_per_req
        if num_blocks is None:
            num_blocks = max(width, rows * max(width // _DEFAULT_SHARE, min(width, _FEWEST_OF_A_ROW)))
        if fan_out is None:
            fan_out = min(max(power_of_two(math.isqrt(width - 1) + 1), 16), 256)  # other sizes are read 4 times slower
        for name, value, least, most in (("fan_out", fan_out, 2, 1024), ("num_blocks", num_blocks, 1, 2**31 - 1)):
            if not is_count(value) or not least <= value <= most:
                raise ConfigError(f"SparseBlockTable.{name}: got {value!r}, want an integer from {least} to {most}")
        num_nodes = nodes_for(config, num_blocks, fan_out)
        if num_nodes * fan_out >= 2**31:
            raise ConfigError(f"SparseBlockTable: got {num_blocks} blocks, want fewer: places in nodes must fit int32")
        return cls(
            nodes=jnp.full((num_nodes, fan_out), -1, jnp.int32),
            roots=jnp.full(rows, -1, jnp.int32),
            owner=jnp.full(num_nodes, -1, jnp.int32),
            free_nodes=jnp.arange(num_nodes, dtype=jnp.int32)[::-1],
            num_free_nodes=jnp.int32(num_nodes),
            num_blocks=jnp.zeros(rows, jnp.int32),
            num_tokens=jnp.zeros(rows, jnp.int32),
            config=config,
        )

    @classmethod
    def from_dense(cls, table: BlockTable, num_blocks: int | None = None, fan_out: int | None = None) -> Self:
        """The same rows, sparse; see ``create``. Traced, a table that does not fit gives an empty one.

        Raises:
            TableFullError: the rows do not fit.
        """
        empty = cls.create(table.config, num_blocks, fan_out)
        new, ok = _filled(empty, table)
        if is_concrete(ok) and not ok:
            raise_if(empty.no_room_error(*np.nonzero(np.asarray(table.blocks) >= 0)))
        require(ok, TableFullError, "from_dense: want fewer blocks, or more room")
        return new

    def to_block_table(self) -> BlockTable:
        """The same rows, dense."""
        blocks = _all_rows(self)
        return BlockTable(blocks=blocks, num_blocks=self.num_blocks, num_tokens=self.num_tokens, config=self.config)

    @property
    def fan_out(self) -> int:
        """F."""
        return self.nodes.shape[1]

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.nodes.shape[0]

    # -- storage

    def read_blocks(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """See ``TableStorage``."""
        _, digits = self._parts(columns)
        return self._below(self._path(rows, digits)[-1], digits[-1])

    def write_blocks(self, entries: Entries, ok: jax.Array) -> tuple[Self, jax.Array]:
        """See ``TableStorage``."""
        row, column = jnp.clip(entries.rows, 0, self.num_rows - 1), jnp.clip(entries.columns, 0, self.width - 1)
        prefixes, digits = self._parts(column)
        path = jnp.stack(self._path(row, digits))  # [D, n]
        lacking = _is_first(entries.groups, row, prefixes) & (path < 0)
        wanted = jnp.sum(lacking & entries.in_groups(ok), axis=0, dtype=jnp.int32)
        wanted = jnp.zeros(ok.shape, jnp.int32).at[entries.groups].add(wanted, mode="drop")
        ok &= (jnp.cumsum(wanted) <= self.num_free_nodes) | (wanted == 0)

        written = entries.in_groups(ok)
        taken = lacking & written
        rank = jnp.cumsum(taken.ravel(), dtype=jnp.int32).reshape(path.shape)  # from 1, also where a node is shared
        table, given = self._take(jnp.sum(taken, dtype=jnp.int32), taken.size)
        new = given[jnp.maximum(rank - 1, 0)]
        path = jnp.where(path < 0, new, path)

        # Each node's number goes into the node above it, and the block's id into the leaf.
        changed = jnp.concatenate([taken[1:], written[None]])
        values = jnp.concatenate([path[1:], entries.block_ids[None]])
        nodes = table.nodes.at[jnp.where(changed, path, self.num_nodes), digits].set(values, mode="drop")
        roots = self.roots.at[jnp.where(taken[0], row, self.num_rows)].set(path[0], mode="drop")
        owner = self.owner.at[jnp.where(taken, new, self.num_nodes)].set(row, mode="drop")
        return dataclasses.replace(table, nodes=nodes, roots=roots, owner=owner), ok

    def empty_rows(self, mask: jax.Array) -> Self:
        """See ``TableStorage``. Costs O(N); what freed nodes hold is erased when they are taken again."""
        freed = (self.owner >= 0) & mask[jnp.maximum(self.owner, 0)]
        rank = jnp.cumsum(freed, dtype=jnp.int32)
        place = jnp.where(freed, self.num_free_nodes + rank - 1, self.num_nodes)
        node = jnp.arange(self.num_nodes, dtype=jnp.int32)
        return dataclasses.replace(
            self,
            roots=jnp.where(mask, -1, self.roots),
            owner=jnp.where(freed, -1, self.owner),
            free_nodes=self.free_nodes.at[place].set(node, mode="drop"),
            num_free_nodes=self.num_free_nodes + rank[-1],
        )

    def exchange_rows(self, target: jax.Array, source: jax.Array) -> Self:
        """See ``TableStorage``. Costs O(N)."""
        moved_from = jnp.where(target < self.num_rows, source, self.num_rows)
        row_now = jnp.arange(self.num_rows, dtype=jnp.int32).at[moved_from].set(target, mode="drop")
        return dataclasses.replace(
            self,
            roots=self.roots.at[target].set(self.roots[source], mode="drop"),
            owner=jnp.where(self.owner < 0, -1, row_now[jnp.maximum(self.owner, 0)]),
        )

    def dense_rows(self, rows: jax.Array | None, max_blocks: int) -> jax.Array:
        """See ``TableStorage``. Reads whole leaves."""
        wanted = jnp.arange(self.num_rows, dtype=jnp.int32) if rows is None else rows
        row, columns = jnp.clip(wanted, 0, self.num_rows - 1), min(max_blocks, self.width)
        first_columns = jnp.arange(0, columns, self.fan_out, dtype=jnp.int32)[None]
        leaf = self._path(row[:, None], self._parts(first_columns)[1])[-1]
        leaf = jnp.where((row == wanted)[:, None], leaf, -1)  # [B, leaves]
        blocks = jnp.where(leaf[:, :, None] < 0, -1, self.nodes[jnp.maximum(leaf, 0)])
        blocks = blocks.reshape(row.shape[0], leaf.shape[1] * self.fan_out)[:, :columns]
        return jnp.pad(blocks, ((0, 0), (0, max_blocks - columns)), constant_values=-1)

    def after_reading(self, read: jax.Array) -> Self:
        """See ``TableStorage``."""
        return dataclasses.replace(self, nodes=after(self.nodes, read))

    def no_room_error(self, rows: np.ndarray, columns: np.ndarray) -> KVCacheError | None:
        """See ``TableStorage``."""
        wanted = int(_nodes_wanted(self, padded(rows), padded(columns)))
        if wanted <= int(self.num_free_nodes):
            return None
        return TableFullError(
            f"got {len(rows)} blocks that need {wanted} more nodes, want at most the {self.num_free_nodes} free of the"
            f" table's {self.num_nodes}"
        )

    # -- nodes

    def _parts(self, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For each level, root first: the columns' higher digits in base F, and the digit there. i32[D, ...] each."""
        levels = range(_depth(self.width, self.fan_out), -1, -1)
        powers = [min(self.fan_out**level, 2**31 - 1) for level in levels]  # columns are below both
        powers_along = np.array(powers, np.int32).reshape(-1, *(1 for _ in columns.shape))
        quotients = lax.div(*jnp.broadcast_arrays(columns, powers_along))  # // would take care of negative ones
        return quotients[:-1], lax.rem(quotients[1:], jnp.int32(self.fan_out))

    def _below(self, node: jax.Array, digit: jax.Array) -> jax.Array:
        """What stands at place ``digit`` of ``node``; -1 if there is no node."""
        # By one index, and without a test for -1: on CPU a batch of 256 takes a third of the time.
        place = node * self.fan_out + digit
        return self.nodes.reshape(-1).at[place].get(mode="fill", fill_value=-1, wrap_negative_indices=False)

    def _path(self, rows: jax.Array, digits: jax.Array) -> list[jax.Array]:
        """The nodes, root first and leaf last, D of them, that lead to a column; -1 where there is none."""
        path = [jnp.broadcast_to(self.roots[rows], jnp.broadcast_shapes(rows.shape, digits.shape[1:]))]
        for digit in digits[:-1]:
            path.append(self._below(path[-1], digit))
        return path

    def _take(self, count: jax.Array, most: int) -> tuple[Self, jax.Array]:
        """Take ``count`` free nodes, and erase them: (table, their numbers i32[most], then N)."""
        place = jnp.arange(most, dtype=jnp.int32)
        node = self.free_nodes[jnp.maximum(self.num_free_nodes - 1 - place, 0)]
        given = jnp.where(place < count, node, self.num_nodes)
        nodes = erase_rows(self.nodes, given, count, _NODES_ERASED_TOGETHER)
        free_nodes, num_free_nodes = after(self.free_nodes, node), self.num_free_nodes - count
        return dataclasses.replace(self, nodes=nodes, free_nodes=free_nodes, num_free_nodes=num_free_nodes), given


@jax.jit
def _filled(empty: SparseBlockTable, table: BlockTable) -> tuple[SparseBlockTable, jax.Array]:
    """``empty`` with all that is in ``table``, and ok bool[]; still empty if it does not fit."""
    blocks = table.blocks.ravel()
    held, total = blocks >= 0, blocks.shape[0]
    size = min(total, empty.nodes.size)
    place = jnp.nonzero(held, size=size, fill_value=total)[0].astype(jnp.int32)
    entries = Entries(
        rows=place // table.width,
        columns=place % table.width,
        block_ids=blocks.at[place].get(mode="fill", fill_value=-1),
        groups=(place == total).astype(jnp.int32),
    )
    new, ok = empty.write_blocks(entries, (jnp.sum(held) <= size)[None])
    num_blocks, num_tokens = (jnp.where(ok[0], x, 0) for x in (table.num_blocks, table.num_tokens))
    return dataclasses.replace(new, num_blocks=num_blocks, num_tokens=num_tokens), ok[0]


@jax.jit
def _all_rows(table: SparseBlockTable) -> jax.Array:
    return table.dense_rows(None, table.width)


@jax.jit
def _nodes_wanted(table: SparseBlockTable, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """i32[]: nodes that blocks in these columns, sorted, would take; row -1 is padding."""
    prefixes, digits = table._parts(columns)
    path = jnp.stack(table._path(rows, digits))
    return jnp.sum(_is_first(rows, rows, prefixes) & (path < 0) & (rows >= 0), dtype=jnp.int32)


def _is_first(groups: jax.Array, rows: jax.Array, prefixes: jax.Array) -> jax.Array:
    """bool[D, n]: whether an entry, of those sorted i32[n], is the first of its group in its node on each level.

    Entries of a row with the same ``prefixes`` i32[D, n] pass through the same nodes.
    """
    differs = (prefixes[:, 1:] != prefixes[:, :-1]) | (rows[1:] != rows[:-1]) | (groups[1:] != groups[:-1])
    return jnp.pad(differs, ((0, 0), (min(1, rows.shape[0]), 0)), constant_values=True)


def nodes_for(config: BlockTableConfig, num_blocks: int, fan_out: int) -> int:
    """Nodes that hold any ``num_blocks`` blocks in rows without holes.

    Nodes that span S columns are most when as many rows as can have one block in one of their own, and then rows grow
    by S blocks each.
    """
    rows, width = config.max_num_reqs, config.max_num_blocks_per_req
    spans = [fan_out**level for level in range(1, _depth(width, fan_out) + 1)]
    begun = min(rows, num_blocks)
    return sum(min(begun + (num_blocks - begun) // span, rows * math.ceil(width / span)) for span in spans)


def _depth(width: int, fan_out: int) -> int:
    """D, the least with ``fan_out ** D >= width``, and at least 1."""
    depth = 1
    while fan_out**depth < width:
        depth += 1
    return depth
