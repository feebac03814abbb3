"""From a position in a sequence to the slot that holds its K and V.

``slot = block * block_size + offset``; -1 means nowhere. Hybrid block sizes leave slots as they are: kernel blocks
are pieces of the same memory.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pyagent_kv_jax.errors import ShapeMismatchError
from pyagent_kv_jax.tables.compressed_slot_mapping import CompressedSlotMapping, compress_slots
from pyagent_kv_jax.tables.ragged import offsets_from_lengths, rows_of_entries
from pyagent_kv_jax.tables.table_storage import TableStorage


class ContextParallel(NamedTuple):
    """A context spread over ``size`` ranks, seen from ``rank`` (may be traced).

    ``interleave`` consecutive tokens stay on one rank; it divides the block size. A column of the table then stands
    for ``block_size * size`` tokens, and the same block id is used on every rank.
    """

    size: Any
    rank: ArrayLike
    interleave: Any = 1


class MapsTokens(Protocol):
    """A block table of any form, as far as a slot mapping needs it."""

    def update_slot_mapping(self, token_positions: ArrayLike) -> SlotMapping:
        """Slots of tokens given as i32[T, 2] of (row, position)."""


@partial(jax.tree_util.register_dataclass, data_fields=["slots"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SlotMapping:
    """Where each of T tokens is stored: ``slots`` i32[T], padding -1."""

    slots: jax.Array

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.slots.shape[0]

    def update_slot_mapping(self, table: MapsTokens, token_positions: ArrayLike) -> Self:
        """The slots of other tokens in a mapping of the same length.

        Args:
            table: where their rows' blocks stand.
            token_positions: i32[n, 2] of (row, position), n <= T; (-1, -1) is padding.

        Raises:
            ShapeMismatchError: more tokens than the mapping holds, or another shape.
            InvalidArgumentError: a row or position that ``table`` does not hold; traced: its slot is -1.
        """
        new = table.update_slot_mapping(token_positions).slots
        missing = self.num_tokens - new.shape[0]
        if missing < 0:
            raise ShapeMismatchError(f"token_positions: got {new.shape[0]} tokens, want at most {self.num_tokens}")
        return dataclasses.replace(self, slots=jnp.pad(new, (0, missing), constant_values=-1) if missing else new)

    def compress(self, block_size: int, capacity: int | None = None) -> tuple[CompressedSlotMapping, jax.Array]:
        """The same mapping in few words; arguments, ``ok`` and errors as in ``compress_slots``."""
        return compress_slots(self.slots, block_size, capacity)


class StepTokens(NamedTuple):
    """The tokens of one step, row after row, padded to T.

    Attributes:
        rows: i32[T], row of the table; padding -1.
        positions: i32[T], position in the row's sequence; padding 0.
        slots: i32[T], padding -1.
        query_start_loc: i32[B + 1], where each batch entry's tokens start.
        ok: bool[B]; false where an entry's tokens no longer fit into T (it then brings none).
    """

    rows: jax.Array
    positions: jax.Array
    slots: jax.Array
    query_start_loc: jax.Array
    ok: jax.Array


def slots_of(
    table: TableStorage,
    rows: jax.Array,
    positions: jax.Array,
    context_parallel: ContextParallel | tuple[Any, ArrayLike, Any] | None = None,
) -> jax.Array:
    """Slots of tokens given by ``rows`` i32[T] and ``positions`` i32[T].

    In one program with changes to the table, read slots after them: a later change would make XLA copy the table.

    Returns:
        i32[T]: -1 for a row or position of -1, past the row's tokens or blocks, or on another context-parallel rank.
    """
    num_rows, width, block_size = table.num_rows, table.width, table.config.block_size
    row = jnp.clip(rows, 0, num_rows - 1)
    known = (rows == row) & (positions >= 0) & (positions < table.num_tokens[row])
    tokens = block_size * (1 if context_parallel is None else context_parallel[0])
    column, offset = positions // tokens, positions % tokens
    if context_parallel is not None:
        offset, here = _local_offsets(offset, context_parallel)
        known &= here
    known &= column < width
    block = table.read_blocks(row, jnp.clip(column, 0, width - 1))
    return jnp.where(known & (block >= 0), block * block_size + offset, -1).astype(jnp.int32)


def step_slots(
    table: TableStorage,
    start_positions: jax.Array,
    lengths: jax.Array,
    num_tokens: int,
    rows: jax.Array | None = None,
    context_parallel: ContextParallel | tuple[Any, ArrayLike, Any] | None = None,
) -> StepTokens:
    """The tokens of one step: entry b brings positions ``start_positions[b] .. + lengths[b] - 1``.

    Args:
        table: after the step's blocks and tokens have been appended.
        start_positions: i32[B].
        lengths: i32[B], tokens each entry brings; 0 for padding.
        num_tokens: T, static: tokens of the step with padding.
        rows: i32[B], the table row of each entry, -1 for padding; None: entry b is row b.
        context_parallel: see ``ContextParallel``.
    """
    ends = jnp.cumsum(jnp.clip(lengths, 0, num_tokens + 1), dtype=jnp.int32)
    fits = ((ends <= num_tokens) & (lengths >= 0)) | (lengths == 0)
    starts = offsets_from_lengths(jnp.where(fits, lengths, 0))
    entries = rows_of_entries(starts, num_tokens)
    real = entries < lengths.shape[0]
    entry = jnp.where(real, entries, 0)
    positions = jnp.where(real, start_positions[entry] + jnp.arange(num_tokens) - starts[entry], 0)
    token_rows = jnp.where(real, entry if rows is None else rows[entry], -1)
    slots = slots_of(table, token_rows, positions, context_parallel)
    return StepTokens(token_rows.astype(jnp.int32), positions.astype(jnp.int32), slots, starts, fits)


def local_slots(
    slots: jax.Array, block_size: int, context_parallel: ContextParallel | tuple[Any, ArrayLike, Any]
) -> jax.Array:
    """Slots on one rank of tokens given by slots of whole blocks.

    A whole block has ``block_size * size`` tokens, in their order; ``block_size`` of them are this rank's.

    Args:
        slots: i32[...], padding -1.
        block_size: slots of a block on one rank.
        context_parallel: see ``ContextParallel``.

    Returns:
        i32[...]: -1 for padding and for tokens of other ranks.
    """
    tokens = block_size * context_parallel[0]
    offset, here = _local_offsets(slots % tokens, context_parallel)
    return jnp.where((slots >= 0) & here, slots // tokens * block_size + offset, -1).astype(jnp.int32)


def _local_offsets(
    offsets: jax.Array, context_parallel: ContextParallel | tuple[Any, ArrayLike, Any]
) -> tuple[jax.Array, jax.Array]:
    """Offsets i32[...] in whole blocks as offsets in this rank's part of them, and whether they are there at all."""
    size, rank, interleave = context_parallel
    return offsets // (size * interleave) * interleave + offsets % interleave, offsets // interleave % size == rank


def local_length(num_tokens: ArrayLike, context_parallel: ContextParallel | tuple[Any, ArrayLike, Any]) -> jax.Array:
    """How many of a sequence's first ``num_tokens`` (i32[...]) tokens this context-parallel rank holds."""
    size, rank, interleave = context_parallel
    turn = size * interleave
    length = jnp.asarray(num_tokens, jnp.int32)
    return length // turn * interleave + jnp.clip(length % turn - rank * interleave, 0, interleave)
