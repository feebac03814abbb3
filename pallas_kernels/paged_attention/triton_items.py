"""Which programs there are: one for each sequence with few queries, one for each tile of the others' rows.

An item is i32[5]: sequence, first row of the tile, token of the sequence's first query, number of queries, kv_len; no
queries means no item. What is known only at run time is how many items there are; the bound is known at trace time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables


def items_of_decode(kv_lens: jax.Array) -> jax.Array:
    """Item i is sequence i, whose one query is token i."""
    index = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    return jnp.stack([index, jnp.zeros_like(index), index, jnp.ones_like(index), kv_lens], axis=1)


def items_of_short(of: Sequences, most: int) -> jax.Array:
    """Item i is sequence i, with all its queries if those are ``most`` or fewer."""
    index = jnp.arange(of.start.shape[0], dtype=jnp.int32)
    queries = jnp.where(of.query_len <= most, of.query_len, 0)
    return jnp.stack([index, jnp.zeros_like(index), of.start, queries, of.kv_len], axis=1)


def items_of_long(of: Sequences, tokens: int, *, more_than: int, group: int, rows: int, aligned: int = 1) -> jax.Array:
    """Tiles of ``rows`` rows of all sequences with ``more_than`` queries or more, the last tiles first.

    Tokens that belong to no sequence, before the first and after the last, count as two more sequences, of no keys:
    their queries stand at negative positions, and so their outputs are written too.

    A sequence's first tile starts at its first token, or, where tiles must start at a multiple of ``aligned`` tokens,
    at the last such before it: the tile's first row is then negative.
    """
    seqs = of.start.shape[0]
    zero = jnp.zeros(1, jnp.int32)
    end = of.start[-1:] + of.query_len[-1:]
    start = jnp.concatenate([zero, of.start, end])
    query_len = jnp.concatenate([of.start[:1], of.query_len, tokens - end])
    kv_len = jnp.concatenate([zero, of.kv_len, zero])
    is_real = jnp.arange(seqs + 2) % (seqs + 1) != 0
    mine = (query_len > more_than) | ~is_real
    lead = start % aligned
    tiles = jnp.where(mine & (query_len > 0), -(-(lead + query_len) * group // rows), 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    most = min(seqs, tokens // (more_than + 1)) + 2
    bound = (tokens + most * (aligned - 1)) * group // rows + most
    index = jnp.arange(bound, dtype=jnp.int32)[::-1]
    which = jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32), seqs + 1)
    first_row = (index - (ends - tiles)[which]) * rows - (lead * group)[which]
    queries = jnp.where(index < ends[-1], query_len[which], 0)
    sequence = jnp.clip(which - 1, 0, seqs - 1)
    return jnp.stack([sequence, first_row, start[which], queries, kv_len[which]], axis=1)


def columns_of(items: jax.Array, tables: Tables, visibility: Visibility, *, group: int, rows: int) -> jax.Array:
    """First and one past the last column of the tables that some row of each item sees, i32[items, 2]."""
    sequence, first_row, _, queries, kv_len = items.T
    last_row = jnp.minimum(first_row + rows, queries * group) - 1
    first_position = kv_len - queries
    start, _ = visibility.interval(first_position + first_row // group, kv_len)
    _, end = visibility.interval(first_position + last_row // group, kv_len)
    return jnp.stack(jax.vmap(tables.needed_columns)(sequence, start, end), axis=1)
