"""Pool and table moving together: what both the cache pytree and the manager do in one step.

Pure functions over a whole batch. Lengths live in the table (``num_tokens``), ownership in the pool, nothing twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable, append_rows, release_rows, slots_of, step_slots


def extend_rows(
    pool: BlockPool,
    table: BlockTable,
    lens: jax.Array,
    *,
    capacity: int,
    rows: jax.Array | None = None,
    order: jax.Array | None = None,
) -> tuple[BlockPool, BlockTable, jax.Array]:
    """Make room for ``lens`` i32[B] more tokens, all or nothing per row.

    Args:
        pool: the blocks.
        table: R rows.
        lens: new tokens of each row of the batch; 0 leaves a row as it is.
        capacity: static; most new blocks of all rows together.
        rows: i32[B], the table row of each row of the batch, no row twice, -1 for padding. None: all rows, B = R.
        order: i32[B], rows of the batch in the order they are served; None: 0 to B - 1.

    Returns:
        (pool, table, ok bool[B]). A row is refused where blocks are short (and then every later one that needs
        blocks), where ``lens`` is negative, or where the row would outgrow its width; a refused row is unchanged.
    """
    config = table.config
    held_tokens, held_blocks = table.num_tokens, table.num_blocks
    if rows is not None:
        padding = rows < 0
        lens = jnp.where(padding, 0, lens)
        held_tokens, held_blocks = (jnp.where(padding, 0, held[rows]) for held in (held_tokens, held_blocks))
    total = held_tokens + lens
    blocks = (total + config.block_size - 1) // config.block_size - held_blocks
    possible = (lens >= 0) & (total <= config.max_tokens_per_req)
    pool, admitted = pool.admit(jnp.where(possible, jnp.maximum(blocks, 0), -1), capacity=capacity, order=order)
    table, _ = append_rows(table, admitted.ids, admitted.row_offsets, jnp.where(admitted.ok, lens, 0), rows)
    return pool, table, admitted.ok


def free_rows(
    pool: BlockPool, table: BlockTable, rows: jax.Array, *, capacity: int
) -> tuple[BlockPool, BlockTable, jax.Array]:
    """Drop every reference the rows in the mask ``rows`` bool[R] hold, and empty them.

    A row's blocks are freed tail first, so that a shared prefix is the last to be reused.

    Args:
        pool: the blocks.
        table: R rows.
        rows: mask.
        capacity: static; most blocks freed.

    Returns:
        (pool, table, ok bool[R]). A row is refused, and keeps its blocks, where the rows before it leave too little of
        ``capacity``; a row that holds nothing is always ok.
    """
    table, released = release_rows(table, rows, capacity)
    pool, _ = pool.free(released.ids)
    return pool, table, released.ok


def step_metadata(
    table: BlockTable,
    rows: jax.Array,
    lens: jax.Array,
    ok: jax.Array,
    num_tokens: int | None,
    *,
    num_groups: int = 1,
) -> AttentionMetadata:
    """Tables, lengths, positions and slots of a step, after ``extend_rows``.

    Args:
        table: already extended.
        rows: i32[B], the table row of each row of the batch; -1 is padding.
        lens: i32[B], tokens of each as they are laid out in the batch, at least 0.
        ok: bool[B], whether the row was served; if not, its tokens get no slots and attend to nothing.
        num_tokens: static; tokens the batch is padded to, laid out one row after another; no fewer than the served
            rows bring. None: decode layout, token i belongs to batch row i, and no row brings more than one.
        num_groups: static; G layer groups, see ``rows_of_groups``. ``rows`` are those of the first group then.
    """
    served = ok & (rows >= 0) & (lens > 0)
    rows = jnp.where(served, rows, -1)
    kv_lens = jnp.where(served, table.num_tokens[rows], 0)  # row -1 reads the last row, and what it reads is dropped
    if num_tokens is None:
        token_rows, positions, query_start_loc = rows, kv_lens - 1, None
        slots = slots_of(table, rows, positions)
    else:
        tokens = step_slots(table, kv_lens - lens, lens, num_tokens, rows)
        token_rows, positions, query_start_loc = tokens.rows, tokens.positions, tokens.query_start_loc
        slots = tokens.slots
    block_tables = jnp.where(served[:, None], table.blocks[rows], -1)
    if num_groups > 1:
        block_tables = jnp.where(served[:, None], table.blocks[rows_of_groups(table, rows, num_groups)], -1)
        others = rows_of_groups(table, token_rows, num_groups)[1:]
        slots = jnp.stack([slots, *(slots_of(table, other, positions) for other in others)])
    return AttentionMetadata(
        block_tables=block_tables,
        kv_lens=kv_lens,
        query_start_loc=query_start_loc,
        slot_mapping=slots,
        positions=jnp.maximum(positions, 0),
        ok=ok,
        max_query_len=1 if num_tokens is None else num_tokens,
        max_kv_len=table.config.max_tokens_per_req,
    )


def rows_of_groups(table: BlockTable, rows: jax.Array, num_groups: int) -> jax.Array:
    """i32[G, B]: the rows of requests ``rows`` i32[B] in a table that holds the rows of G groups one after another.

    Request r has row ``g * num_rows / G + r`` for group g; -1 stays -1.
    """
    first = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * (table.num_rows // num_groups)
    return jnp.where(rows < 0, -1, rows + first)
