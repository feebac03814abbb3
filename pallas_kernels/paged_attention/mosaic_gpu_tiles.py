"""Which tiles of queries there are, and which steps of keys each reads: worked out by XLA before the kernel runs."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.triton_items import items_of_long
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables

# TMA moves rows of queries in groups of 8, as they lie in shared memory, and only whole ones: a box that starts inside
# a group loses what is past its end.
ALIGNED = 8


class Tile(NamedTuple):
    """Queries of one sequence; every field i32[], or i32[tiles] for all of them.

    Attributes:
        sequence: which.
        row: row of q where the tile starts, a multiple of ``ALIGNED``; up to so many rows before its first query.
        token: row of q of the first query.
        num_queries: 0: there is no such tile.
        position: of the first query.
        kv_len: of the sequence.
        first_step, last_step: first and one past the last step of keys of which some query sees one.
        first_whole_step, last_whole_step: between these, every query sees every key.
        first_seen, last_seen: first and one past the last position that some query sees.
    """

    sequence: Any
    row: Any
    token: Any
    num_queries: Any
    position: Any
    kv_len: Any
    first_step: Any
    last_step: Any
    first_whole_step: Any
    last_whole_step: Any
    first_seen: Any
    last_seen: Any

    @classmethod
    def read(cls, tiles: Any, index: Any) -> Self:
        """Number ``index`` of ``tiles``, a ref to i32[tiles, fields]."""
        return cls(*(tiles[index, field] for field in range(len(cls._fields))))


def tiles_of_long(
    of: Sequences, tables: Tables, visibility: Visibility, tokens: int, *, more_than: int, queries: int, keys: int
) -> Tile:
    """Tiles of ``queries`` queries of all sequences with more than ``more_than``; steps are of ``keys`` keys."""
    items = items_of_long(of, tokens, more_than=more_than, group=1, rows=queries, aligned=ALIGNED)
    sequence, row, start, query_len, kv_len = items.T
    first = jnp.maximum(row, 0)
    num_queries = jnp.maximum(jnp.minimum(row + queries, query_len) - first, 0)
    position = kv_len - query_len + first
    last_position = position + jnp.maximum(num_queries - 1, 0)
    first_seen, all_end = visibility.interval(position, kv_len)
    all_start, last_seen = visibility.interval(last_position, kv_len)
    first_step, last_step = _steps(tables, sequence, first_seen, last_seen, keys)
    first_whole, last_whole = _whole_steps(of, tables, visibility, sequence, all_start, all_end, keys)
    return Tile(
        sequence,
        start + row,
        start + first,
        num_queries,
        position,
        kv_len,
        first_step,
        last_step,
        first_whole,
        last_whole,
        first_seen,
        last_seen,
    )


def _steps(
    tables: Tables, sequence: jax.Array, start: jax.Array, end: jax.Array, keys: int
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last step with a key at a position in [start, end); equal if there is none."""
    if tables.positions is None:
        held = tables.width * tables.block_size
        low, high = tables.context.local_length(start), jnp.minimum(tables.context.local_length(end), held)
    else:
        columns = jax.vmap(tables.needed_columns)(sequence, start, end)
        low, high = (column * tables.block_size for column in columns)
    first = low // keys
    return first, jnp.where(high > low, -(-high // keys), first)


def _whole_steps(
    of: Sequences,
    tables: Tables,
    visibility: Visibility,
    sequence: jax.Array,
    start: jax.Array,
    end: jax.Array,
    keys: int,
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last step with nothing but keys at positions in [start, end); equal if in doubt."""
    if tables.positions is not None:
        return jnp.zeros_like(sequence), jnp.zeros_like(sequence)
    first = -(-tables.context.local_length(start) // keys)
    last = jnp.minimum(tables.context.local_length(end), tables.width * tables.block_size) // keys
    return first, jnp.where(_has_hole(of, tables, visibility)[sequence], first, jnp.maximum(last, first))


def _has_hole(of: Sequences, tables: Tables, visibility: Visibility) -> jax.Array:
    """bool[seqs]: whether a page is missing where some query of the sequence looks."""
    start, _ = visibility.interval(of.kv_len - of.query_len, of.kv_len)
    first, last = jax.vmap(tables.needed_columns)(jnp.arange(of.kv_len.size), start, of.kv_len)
    column = jnp.arange(tables.width, dtype=jnp.int32)
    needed = (column >= first[:, None]) & (column < last[:, None])
    return jnp.any(needed & (tables.blocks[:, : tables.width] < 0), axis=1)
