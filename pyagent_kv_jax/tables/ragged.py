"""Ragged rows stored flat: row r of ``values[F]`` is ``values[row_offsets[r] : row_offsets[r + 1]]``."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def offsets_from_lengths(lengths: jax.Array) -> jax.Array:
    """i32[R] -> i32[R + 1]: where each row starts, and where the last one ends."""
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


def rows_of_entries(row_offsets: jax.Array, capacity: int) -> jax.Array:
    """i32[R + 1] -> i32[capacity]: the row each flat entry belongs to; R (no row) past the last one."""
    ends = jnp.zeros(capacity, jnp.int32).at[row_offsets[1:]].add(1, mode="drop")
    return jnp.cumsum(ends, dtype=jnp.int32)  # as many rows as end before the entry


def are_offsets(row_offsets: jax.Array, capacity: int) -> jax.Array:
    """bool[]: whether ``row_offsets`` starts at 0, never falls and ends within ``capacity``."""
    return (row_offsets[0] == 0) & jnp.all(jnp.diff(row_offsets) >= 0) & (row_offsets[-1] <= capacity)
