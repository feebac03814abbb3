"""What a table does for one row, or for rows given by plain values: checked arguments, one jitted call each.

Called with plain values, a method raises when an argument is wrong. Traced, where nothing can raise, the wrong argument
changes nothing (reads give -1 or 0), and ``checkify`` reports it in ``checking()``. ``rows.py`` and ``slot_mapping.py``
have the pure functions over many rows.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import as_int32, integer, integers, shown, static_count
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    ShapeMismatchError,
    is_concrete,
    require,
)
from pyagent_kv_jax.tables import rows as batched
from pyagent_kv_jax.tables.block_ids import NO_BLOCK, new_block_ids
from pyagent_kv_jax.tables.padding import padded, power_of_two
from pyagent_kv_jax.tables.refusals import raise_if, why_not_appended, why_not_set
from pyagent_kv_jax.tables.slot_mapping import ContextParallel, SlotMapping, slots_of
from pyagent_kv_jax.tables.table_display import table_html, table_line
from pyagent_kv_jax.tables.table_storage import TableStorage


@dataclasses.dataclass(frozen=True, repr=False)
class RowMethods(TableStorage):
    """The methods of every form of a block table."""

    def __repr__(self) -> str:
        return table_line(self)

    def _repr_html_(self) -> str:
        return table_html(self)

    # -- rows

    def append_row(self, row_idx: ArrayLike, block_ids: ArrayLike, num_tokens: ArrayLike) -> Self:
        """Append ``block_ids`` i32[n] to a row that gains ``num_tokens`` tokens. n may be 0.

        Raises:
            RequestTooLongError: the row has no columns left for them.
            InvalidArgumentError: no such row, a negative count, or more tokens than the row's blocks hold.
            InvalidBlockError: an id below 0 or above ``max_block_id``.
            TableFullError: a sparse table has no room for them.
        """
        row, ids = self.check_row(row_idx), new_block_ids(block_ids)
        tokens = integer("num_tokens", num_tokens)
        table, ok = _append_row(self, row, ids, tokens)
        if is_concrete(ok) and not ok:
            raise_if(why_not_appended(self, int(row), np.asarray(ids), int(tokens)))
        require(ok, InvalidArgumentError, "append_row: the row is not there or cannot hold these blocks and tokens")
        return table

    def get_row(self, row_idx: ArrayLike) -> jax.Array:
        """i32[W]: the row's block ids, padding -1.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _to_dense(self, self.check_row(row_idx), self.width)

    def clear_row(self, row_idx: ArrayLike) -> Self:
        """Empty a row. Its blocks are not freed: that is the pool's.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _clear_row(self, self.check_row(row_idx))

    def move_row(self, src: ArrayLike, dst: ArrayLike) -> Self:
        """Move row ``src`` to ``dst``, which must be empty (or ``src`` itself); ``src`` is empty afterwards.

        Raises:
            InvalidArgumentError: no such row, or ``dst`` holds blocks that would be lost.
        """
        source, target = self.check_row(src, "src"), self.check_row(dst, "dst")
        table, ok = _move_row(self, source, target)
        require(ok, InvalidArgumentError, f"move_row: row dst={shown(dst)} holds blocks, want an empty row")
        return table

    def swap_rows(self, a: ArrayLike, b: ArrayLike) -> Self:
        """Exchange rows ``a`` and ``b``.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _swap_rows(self, self.check_row(a, "a"), self.check_row(b, "b"))

    def get_num_blocks(self, row_idx: ArrayLike) -> jax.Array:
        """i32[]: blocks of the row; 0 for a traced row that is not there.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _get_num_blocks(self, self.check_row(row_idx))

    def get_total_blocks(self) -> jax.Array:
        """i32[]: blocks of all rows together; a block two rows share counts twice."""
        return _get_total_blocks(self)

    # -- blocks in any columns

    def set_block(self, row_idx: ArrayLike, position: ArrayLike, block_id: ArrayLike) -> Self:
        """Put a block into column ``position`` of a row, in place of the one there, if any.

        The row then counts at least all blocks and tokens up to the end of this one. Columns before it that were
        never set are -1, and their tokens have no slot.

        Raises:
            RequestTooLongError: the row has no such column.
            InvalidArgumentError: no such row, or a negative position.
            InvalidBlockError: an id below 0 or above ``max_block_id``.
            TableFullError: a sparse table has no room for it.
        """
        row, column, block = self.check_row(row_idx), integer("position", position), integer("block_id", block_id)
        table, ok = _set_block(self, row, column, block)
        if is_concrete(ok) and not ok:
            raise_if(why_not_set(self, *(np.reshape(np.asarray(x), 1) for x in (row, column, block))))
        require(ok, InvalidArgumentError, "set_block: no such row or column, no block id, or no room")
        return table

    def set_blocks(self, rows: ArrayLike, columns: ArrayLike, block_ids: ArrayLike) -> tuple[Self, jax.Array]:
        """``set_block`` for n blocks at once, all of them or none: i32[n] each; row -1 is padding.

        Returns:
            (table, ok bool[]).

        Raises:
            ShapeMismatchError: not integers, or not equally many.
            InvalidArgumentError: a column of a row named twice. Else as ``set_block``.
        """
        row = integers("rows", rows)
        entries = (
            row,
            *(integers(name, x, row.shape[0]) for name, x in (("columns", columns), ("block_ids", block_ids))),
        )
        if is_concrete(entries):
            entries = tuple(padded(x) for x in entries)
        table, ok = _set_blocks(self, *entries)
        if is_concrete(ok) and not ok:
            raise_if(why_not_set(self, *(np.asarray(x)[np.asarray(entries[0]) != -1] for x in entries)))
        return table, ok

    def get_block(self, row_idx: ArrayLike, position: ArrayLike) -> jax.Array:
        """i32[]: the block in column ``position`` of a row; -1 where there is none.

        Raises:
            InvalidArgumentError: no such row, or a negative position.
        """
        return _get_block(self, self.check_row(row_idx), _position(position))

    def get_blocks(self, rows: ArrayLike, columns: ArrayLike) -> jax.Array:
        """i32[n]: the blocks at ``rows`` i32[n] and ``columns`` i32[n]; -1 where there is none.

        Raises:
            ShapeMismatchError: not integers, or not equally many.
        """
        row = integers("rows", rows)
        return _get_blocks(self, row, integers("columns", columns, row.shape[0]))

    def to_dense(self, row_idx: ArrayLike, max_blocks: int) -> jax.Array:
        """i32[max_blocks]: the first columns of a row, -1 where there is no block.

        Raises:
            InvalidArgumentError: no such row, or a negative count.
        """
        return _to_dense(self, self.check_row(row_idx), static_count("max_blocks", max_blocks))

    def to_dense_rows(self, rows: ArrayLike, max_blocks: int) -> jax.Array:
        """i32[B, max_blocks]: the first columns of ``rows`` i32[B], as attention reads them; all -1 for row -1.

        Raises:
            ShapeMismatchError: not integers.
            InvalidArgumentError: a negative count.
        """
        return _to_dense_rows(self, integers("rows", rows), static_count("max_blocks", max_blocks))

    # -- slots

    def get_slot(self, row_idx: ArrayLike, position: ArrayLike) -> jax.Array:
        """i32[]: the slot of the token at ``position`` of a row; -1 where there is none.

        Raises:
            InvalidArgumentError: no such row, or a negative position.
        """
        return _get_slot(self, self.check_row(row_idx), _position(position))

    def get_slots(self, rows: ArrayLike, positions: ArrayLike) -> jax.Array:
        """i32[T]: the slots of the tokens at ``rows`` i32[T] and ``positions`` i32[T]; -1 where there is none.

        Raises:
            ShapeMismatchError: not integers, or not equally many.
        """
        row = integers("rows", rows)
        return _get_slots(self, row, integers("positions", positions, row.shape[0]))

    def compute_slot_mapping(self, row_idx: ArrayLike, num_tokens: int, start_position: ArrayLike) -> SlotMapping:
        """Slots of the row's tokens ``start_position .. start_position + num_tokens - 1``.

        ``num_tokens`` is an ordinary integer, for it is the length of the result; compiled once for each power of two.

        Raises:
            InvalidArgumentError: no such row, a negative count or position, or tokens that the row does not hold.
        """
        row, start = self.check_row(row_idx), integer("start_position", start_position)
        length = static_count("num_tokens", num_tokens)
        size = power_of_two(length)
        slots, held = _row_slots(self, row, start, jnp.int32(length), size)
        fits = (start >= 0) & (start <= held - length)
        require(
            fits,
            InvalidArgumentError,
            f"compute_slot_mapping: got {length} tokens from position {shown(start)} on,"
            f" want tokens among the {shown(held)} of row {shown(row)}",
        )
        if is_concrete(slots) and size != length:
            return SlotMapping(jnp.asarray(np.asarray(slots)[:length]))  # cut on the host: no program for each length
        return SlotMapping(slots[:length])

    def update_slot_mapping(self, token_positions: ArrayLike) -> SlotMapping:
        """Slots of any tokens, given as i32[T, 2] of (row, position); (-1, -1) is padding and gets -1.

        Raises:
            ShapeMismatchError: not integers of shape [T, 2].
            InvalidArgumentError: a row that is not there, a position past the row's tokens, or no int32.
        """
        tokens = token_positions if isinstance(token_positions, jax.Array) else np.asarray(token_positions)
        want = "int32[T, 2] of (row, position)"
        if tokens.ndim != 2 or tokens.shape[1] != 2:
            raise ShapeMismatchError(f"token_positions: got {tokens.dtype}{list(tokens.shape)}, want {want}")
        tokens = as_int32("token_positions", tokens, want)
        slots, ok = _token_slots(self, tokens)
        if is_concrete(ok) and not ok:
            wrong = np.asarray(tokens)[(np.asarray(slots) < 0) & np.any(np.asarray(tokens) != -1, axis=1)][0]
            raise InvalidArgumentError(
                f"token_positions: got row {wrong[0]}, position {wrong[1]}, want one of {self.num_rows} rows"
                " and a position that it holds, or (-1, -1)"
            )
        require(ok, InvalidArgumentError, "token_positions: a row or position that the table does not hold")
        return SlotMapping(slots)

    def context_parallel(self, size: int, rank: ArrayLike) -> ContextParallel:
        """The layout of this table's slots over ``size`` ranks, with the configured interleave."""
        return ContextParallel(size, rank, self.config.cp_kv_cache_interleave_size)

    def kernel_block_tables(self, rows: ArrayLike | None = None, max_blocks: int | None = None) -> jax.Array:
        """i32[B, max_blocks * k]: the blocks as the kernels see them; block b is kernel blocks ``b*k .. b*k + k - 1``.

        Args:
            rows: i32[B], those of a batch, -1 for padding. None: all R.
            max_blocks: columns before they are split. None: all W.

        Raises:
            ShapeMismatchError: rows that are not integers.
            InvalidArgumentError: a negative count.
        """
        row = None if rows is None else integers("rows", rows)
        columns = self.width if max_blocks is None else static_count("max_blocks", max_blocks)
        return _kernel_block_tables(self, row, columns)

    def check_row(self, row_idx: ArrayLike, name: str = "row_idx") -> Any:
        """``row_idx`` as np.int32, or as it is when traced.

        Raises:
            InvalidArgumentError: not an integer, or no such row.
        """
        row = integer(name, row_idx)
        if is_concrete(row):
            if not 0 <= row < self.num_rows:
                raise InvalidArgumentError(f"{name}: got {row}, want a row in [0, {self.num_rows})")
        else:
            inside = (row >= 0) & (row < self.num_rows)
            require(inside, InvalidArgumentError, f"{name}: want a row in [0, {self.num_rows})")
        return row


def _position(position: ArrayLike) -> Any:
    value = integer("position", position)
    require(value >= 0, InvalidArgumentError, f"position: got {shown(value)}, want 0 or more")
    return value


@jax.jit
def _append_row(table: RowMethods, row: Any, ids: jax.Array, tokens: Any) -> tuple[Any, jax.Array]:
    offsets = jnp.stack([jnp.int32(0), jnp.sum(ids != NO_BLOCK, dtype=jnp.int32)])
    rows = jnp.where(row < 0, table.num_rows, row)  # -1 would mean: pass over
    return batched.append_rows(table, ids, offsets, jnp.reshape(tokens, 1), jnp.reshape(rows, 1))


@jax.jit
def _set_block(table: RowMethods, row: Any, column: Any, block: Any) -> tuple[Any, jax.Array]:
    row = jnp.where(row < 0, table.num_rows, row)  # -1 would mean: pass over
    return batched.set_blocks(table, *(jnp.reshape(x, 1).astype(jnp.int32) for x in (row, column, block)))


_set_blocks = jax.jit(batched.set_blocks)
_get_blocks = jax.jit(batched.get_blocks)
_get_slots = jax.jit(slots_of)


@jax.jit
def _get_block(table: RowMethods, row: Any, column: Any) -> jax.Array:
    return batched.get_blocks(table, jnp.reshape(row, 1), jnp.reshape(column, 1))[0]


@jax.jit
def _get_slot(table: RowMethods, row: Any, position: Any) -> jax.Array:
    return slots_of(table, jnp.reshape(row, 1), jnp.reshape(position, 1))[0]


@partial(jax.jit, static_argnums=2)
def _to_dense(table: RowMethods, row: Any, max_blocks: int) -> jax.Array:
    return table.dense_rows(jnp.reshape(row, 1), max_blocks)[0]


@partial(jax.jit, static_argnums=2)
def _to_dense_rows(table: RowMethods, rows: jax.Array, max_blocks: int) -> jax.Array:
    return table.dense_rows(rows, max_blocks)


@jax.jit
def _clear_row(table: RowMethods, row: Any) -> Any:
    return batched.clear_rows(table, jnp.arange(table.num_rows) == row)


@jax.jit
def _swap_rows(table: RowMethods, a: Any, b: Any) -> Any:
    pair = jnp.stack([jnp.asarray(a), jnp.where(a == b, -1, b)])
    other = jnp.where(a == b, pair, pair[::-1])
    return batched.reorder_rows(table, pair, other)[0]


@jax.jit
def _move_row(table: RowMethods, src: Any, dst: Any) -> tuple[Any, jax.Array]:
    held = table.num_blocks[jnp.clip(dst, 0, table.num_rows - 1)]
    ok = (src == dst) | (held == 0)
    return _swap_rows(table, src, jnp.where(ok, dst, src)), ok


@jax.jit
def _get_num_blocks(table: RowMethods, row: Any) -> jax.Array:
    inside = (row >= 0) & (row < table.num_rows)
    return jnp.where(inside, table.num_blocks[jnp.clip(row, 0, table.num_rows - 1)], 0)


@jax.jit
def _get_total_blocks(table: RowMethods) -> jax.Array:
    return jnp.sum(table.num_blocks, dtype=jnp.int32)


@partial(jax.jit, static_argnums=4)
def _row_slots(table: RowMethods, row: Any, start: Any, length: Any, padded: int) -> tuple[jax.Array, jax.Array]:
    step = jnp.arange(padded, dtype=jnp.int32)
    rows = jnp.where(step < length, row, -1)
    held = jnp.where((row >= 0) & (row < table.num_rows), table.num_tokens[jnp.clip(row, 0, table.num_rows - 1)], 0)
    return slots_of(table, rows, start + step), held


@jax.jit
def _token_slots(table: RowMethods, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    slots = slots_of(table, tokens[:, 0], tokens[:, 1])
    padding = jnp.all(tokens == -1, axis=1)
    return slots, jnp.all(padding | (slots >= 0))


@partial(jax.jit, static_argnums=2)
def _kernel_block_tables(table: RowMethods, rows: jax.Array | None, max_blocks: int) -> jax.Array:
    k = table.config.blocks_per_kv_block
    blocks = table.dense_rows(rows, max_blocks)
    pieces = jnp.where(blocks[:, :, None] < 0, -1, blocks[:, :, None] * k + jnp.arange(k, dtype=jnp.int32))
    return pieces.reshape(blocks.shape[0], max_blocks * k)
