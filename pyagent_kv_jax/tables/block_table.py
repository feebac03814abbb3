"""Which block holds which part of which sequence. Methods of one row; ``rows.py`` has the forms for many."""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer, shown
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheError,
    RequestTooLongError,
    ShapeMismatchError,
    is_concrete,
    require,
)
from pyagent_kv_jax.tables import rows as batched
from pyagent_kv_jax.tables.slot_mapping import ContextParallel, SlotMapping, slots_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "num_blocks", "num_tokens"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """R rows of up to W blocks. Immutable: each change returns a new table and leaves this one as it was.

    Called with plain values, a method raises when an argument is wrong. Traced, where nothing can raise, the wrong
    argument changes nothing (reads give -1 or 0), and ``checkify`` reports it in ``checking()``.

    Attributes:
        blocks: i32[R, W], block ids; -1 past a row's last block.
        num_blocks: i32[R], blocks of each row.
        num_tokens: i32[R], tokens of each row.
        config: sizes, static.
    """

    blocks: jax.Array
    num_blocks: jax.Array
    num_tokens: jax.Array
    config: BlockTableConfig

    @classmethod
    def create(cls, config: BlockTableConfig) -> Self:
        """A table of ``config.max_num_reqs`` empty rows of ``config.max_num_blocks_per_req`` columns."""
        shape = (config.max_num_reqs, config.max_num_blocks_per_req)
        return cls(
            blocks=jnp.full(shape, -1, jnp.int32),
            num_blocks=jnp.zeros(shape[0], jnp.int32),
            num_tokens=jnp.zeros(shape[0], jnp.int32),
            config=config,
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return self.blocks.shape[0]

    # -- rows

    def append_row(self, row_idx: ArrayLike, block_ids: ArrayLike, num_tokens: ArrayLike) -> Self:
        """Append ``block_ids`` i32[n] to a row that gains ``num_tokens`` tokens. n may be 0.

        Raises:
            RequestTooLongError: the row has no columns left for them.
            InvalidArgumentError: no such row, a negative count, or more tokens than the row's blocks hold.
            InvalidBlockError: a negative id.
        """
        row, ids = self._row(row_idx), _block_ids(block_ids)
        tokens = integer("num_tokens", num_tokens)
        table, ok = _append_row(self, row, ids, tokens)
        if is_concrete(ok) and not ok:
            raise self._why_not_appended(int(row), np.asarray(ids), int(tokens))
        require(
            ok,
            InvalidArgumentError,
            "append_row: the row is not there or cannot hold these blocks and tokens",
        )
        return table

    def get_row(self, row_idx: ArrayLike) -> jax.Array:
        """i32[W]: the row's block ids, padding -1.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _get_row(self, self._row(row_idx))

    def clear_row(self, row_idx: ArrayLike) -> Self:
        """Empty a row. Its blocks are not freed: that is the pool's.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _clear_row(self, self._row(row_idx))

    def move_row(self, src: ArrayLike, dst: ArrayLike) -> Self:
        """Move row ``src`` to ``dst``, which must be empty (or ``src`` itself); ``src`` is empty afterwards.

        Raises:
            InvalidArgumentError: no such row, or ``dst`` holds blocks that would be lost.
        """
        source, target = self._row(src, "src"), self._row(dst, "dst")
        table, ok = _move_row(self, source, target)
        require(ok, InvalidArgumentError, f"move_row: row dst={shown(dst)} holds blocks, want an empty row")
        return table

    def swap_rows(self, a: ArrayLike, b: ArrayLike) -> Self:
        """Exchange rows ``a`` and ``b``.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _swap_rows(self, self._row(a, "a"), self._row(b, "b"))

    def get_num_blocks(self, row_idx: ArrayLike) -> jax.Array:
        """i32[]: blocks of the row; 0 for a traced row that is not there.

        Raises:
            InvalidArgumentError: no such row.
        """
        return _get_num_blocks(self, self._row(row_idx))

    def get_total_blocks(self) -> jax.Array:
        """i32[]: blocks of all rows together; a block two rows share counts twice."""
        return _get_total_blocks(self)

    # -- slots

    def compute_slot_mapping(self, row_idx: ArrayLike, num_tokens: int, start_position: ArrayLike) -> SlotMapping:
        """Slots of the row's tokens ``start_position .. start_position + num_tokens - 1``.

        ``num_tokens`` is an ordinary integer, for it is the length of the result; compiled once for each power of two.

        Raises:
            InvalidArgumentError: no such row, a negative count or position, or tokens that the row does not hold.
        """
        row, start = self._row(row_idx), integer("start_position", start_position)
        length = _length(num_tokens)
        padded = 1 << max(length - 1, 0).bit_length()
        slots, held = _row_slots(self, row, start, jnp.int32(length), padded)
        fits = (start >= 0) & (start <= held - length)
        require(
            fits,
            InvalidArgumentError,
            f"compute_slot_mapping: got {length} tokens from position {shown(start)} on,"
            f" want tokens among the {shown(held)} of row {shown(row)}",
        )
        if is_concrete(slots) and padded != length:
            return SlotMapping(jnp.asarray(np.asarray(slots)[:length]))  # cut on the host: no program for each length
        return SlotMapping(slots[:length])

    def update_slot_mapping(self, token_positions: ArrayLike) -> SlotMapping:
        """Slots of any tokens, given as i32[T, 2] of (row, position); (-1, -1) is padding and gets -1.

        Raises:
            ShapeMismatchError: not integers of shape [T, 2].
            InvalidArgumentError: a row that is not there, or a position past the row's tokens.
        """
        tokens = token_positions if isinstance(token_positions, jax.Array) else np.asarray(token_positions)
        if tokens.ndim != 2 or tokens.shape[1] != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ShapeMismatchError(
                f"token_positions: got {tokens.dtype}{list(tokens.shape)}, want int32[T, 2] of (row, position)"
            )
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

    def kernel_block_tables(self) -> jax.Array:
        """i32[R, W * k]: the blocks as the kernels see them; block b is kernel blocks ``b*k .. b*k + k - 1``."""
        return _kernel_block_tables(self)

    # -- arguments

    def _row(self, row_idx: ArrayLike, name: str = "row_idx") -> Any:
        row = integer(name, row_idx)
        if is_concrete(row):
            if not 0 <= row < self.num_rows:
                raise InvalidArgumentError(f"{name}: got {row}, want a row in [0, {self.num_rows})")
        else:
            inside = (row >= 0) & (row < self.num_rows)
            require(inside, InvalidArgumentError, f"{name}: want a row in [0, {self.num_rows})")
        return row

    def _why_not_appended(self, row: int, ids: np.ndarray, num_tokens: int) -> KVCacheError:
        """The error for an ``append_row`` that was refused."""
        ids = ids[: np.max(np.nonzero(ids != _PAD)[0], initial=-1) + 1]
        held_blocks, held_tokens = int(self.num_blocks[row]), int(self.num_tokens[row])
        width, block_size = self.config.max_num_blocks_per_req, self.config.block_size
        if np.any(ids < 0):
            return InvalidBlockError(f"block_ids: got {ids.min()}, want ids of 0 or more")
        if num_tokens < 0:
            return InvalidArgumentError(f"num_tokens: got {num_tokens}, want 0 or more")
        if held_blocks + len(ids) > width:
            return RequestTooLongError(
                f"row {row}: got {len(ids)} more blocks, want at most {width - held_blocks}"
                f" ({held_blocks} of its {width} columns are taken)"
            )
        room = (held_blocks + len(ids)) * block_size - held_tokens
        return InvalidArgumentError(
            f"num_tokens: got {num_tokens} for row {row}, want at most {room},"
            f" what its {held_blocks + len(ids)} blocks of {block_size} tokens have room for"
        )


_PAD = -(2**31)  # block_ids are padded to a power of two with this; -1 would hide an id that is wrong


def _length(num_tokens: Any) -> int:
    try:
        length = operator.index(num_tokens)
    except TypeError as error:
        raise InvalidArgumentError(f"num_tokens: got {num_tokens!r}, want an integer known at trace time") from error
    if not 0 <= length < 2**31:
        raise InvalidArgumentError(f"num_tokens: got {length}, want 0 or more")
    return length


def _block_ids(block_ids: ArrayLike) -> Any:
    """``block_ids`` as i32[n], on the host padded to a power of two so that few programs are compiled.

    Raises:
        ShapeMismatchError: not a flat array of integers.
    """
    traced = isinstance(block_ids, jax.core.Tracer)
    ids: Any = block_ids if traced else np.asarray(block_ids)
    if ids.ndim != 1 or (ids.size and not jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ShapeMismatchError(f"block_ids: got {ids.dtype}{list(ids.shape)}, want int32[n]")
    if traced:
        return ids
    if ids.size and not (ids.min() > -(2**31) and ids.max() < 2**31):
        raise InvalidBlockError(f"block_ids: got {ids.min()} .. {ids.max()}, want ids that fit int32")
    padded = np.full(1 << max(ids.size - 1, 0).bit_length(), _PAD, np.int32)
    padded[: ids.size] = ids
    return padded


@jax.jit
def _append_row(table: BlockTable, row: Any, ids: jax.Array, tokens: Any) -> tuple[Any, jax.Array]:
    offsets = jnp.stack([jnp.int32(0), jnp.sum(ids != _PAD, dtype=jnp.int32)])
    rows = jnp.where(row < 0, table.num_rows, row)  # -1 would mean: pass over
    return batched.append_rows(table, ids, offsets, jnp.reshape(tokens, 1), jnp.reshape(rows, 1))


@jax.jit
def _get_row(table: BlockTable, row: Any) -> jax.Array:
    inside = (row >= 0) & (row < table.num_rows)
    return jnp.where(inside, table.blocks[jnp.clip(row, 0, table.num_rows - 1)], -1)


@jax.jit
def _clear_row(table: BlockTable, row: Any) -> Any:
    return batched.clear_rows(table, jnp.arange(table.num_rows) == row)


@jax.jit
def _swap_rows(table: BlockTable, a: Any, b: Any) -> Any:
    pair = jnp.stack([jnp.asarray(a), jnp.where(a == b, -1, b)])
    other = jnp.where(a == b, pair, pair[::-1])
    return batched.reorder_rows(table, pair, other)[0]


@jax.jit
def _move_row(table: BlockTable, src: Any, dst: Any) -> tuple[Any, jax.Array]:
    held = table.num_blocks[jnp.clip(dst, 0, table.num_rows - 1)]
    ok = (src == dst) | (held == 0)
    return _swap_rows(table, src, jnp.where(ok, dst, src)), ok


@jax.jit
def _get_num_blocks(table: BlockTable, row: Any) -> jax.Array:
    inside = (row >= 0) & (row < table.num_rows)
    return jnp.where(inside, table.num_blocks[jnp.clip(row, 0, table.num_rows - 1)], 0)


@jax.jit
def _get_total_blocks(table: BlockTable) -> jax.Array:
    return jnp.sum(table.num_blocks, dtype=jnp.int32)


@partial(jax.jit, static_argnums=4)
def _row_slots(table: BlockTable, row: Any, start: Any, length: Any, padded: int) -> tuple[jax.Array, jax.Array]:
    step = jnp.arange(padded, dtype=jnp.int32)
    rows = jnp.where(step < length, row, -1)
    held = jnp.where((row >= 0) & (row < table.num_rows), table.num_tokens[jnp.clip(row, 0, table.num_rows - 1)], 0)
    return slots_of(table, rows, start + step), held


@jax.jit
def _token_slots(table: BlockTable, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.asarray(tokens, jnp.int32)
    slots = slots_of(table, tokens[:, 0], tokens[:, 1])
    padding = jnp.all(tokens == -1, axis=1)
    return slots, jnp.all(padding | (slots >= 0))


@jax.jit
def _kernel_block_tables(table: BlockTable) -> jax.Array:
    k = table.config.blocks_per_kv_block
    blocks = table.blocks[:, :, None]
    pieces = jnp.where(blocks < 0, -1, blocks * k + jnp.arange(k, dtype=jnp.int32))
    return pieces.reshape(table.num_rows, math.prod(pieces.shape[1:]))
