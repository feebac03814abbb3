"""Requests whose layers keep different tokens: a pool and one table of rows for each layer group, moving together.

The G groups' tables are one ``BlockTable`` of G * R rows: request r has row ``g * R + r`` for group g. All its rows
hold the same tokens, and column c of each stands for the same positions, so a request needs as many blocks of every
group; it gets all of them or none. Columns that a group can no longer see (left of its window) have been given back and
are -1. Pure functions over a whole batch; ``allocation.py`` is the plain case of one group.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache.allocation import rows_of_groups
from pyagent_kv_jax.config import BlockTableConfig, LayerGroup
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable
from pyagent_kv_jax.tables.in_place import after
from pyagent_kv_jax.tables.ragged import offsets_from_lengths, rows_of_entries


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pool", "table", "released"],
    meta_fields=["groups"],
)
@dataclasses.dataclass(frozen=True)
class GroupedRows:
    """The blocks and who holds them.

    Attributes:
        pool: N blocks for all groups.
        table: G * R rows.
        released: i32[G * R], leading columns of each row that were given back, or never needed.
        groups: static.
    """

    pool: BlockPool
    table: BlockTable
    released: jax.Array
    groups: tuple[LayerGroup, ...]

    @classmethod
    def create(cls, num_blocks: int, config: BlockTableConfig, groups: tuple[LayerGroup, ...]) -> Self:
        """All blocks free, all of ``config.max_num_reqs`` requests empty."""
        num_rows = config.max_num_reqs * len(groups)
        table = BlockTable.create(dataclasses.replace(config, max_num_reqs=num_rows))
        return cls(BlockPool.create(num_blocks), table, jnp.zeros(num_rows, jnp.int32), groups)

    @property
    def num_requests(self) -> int:
        """R."""
        return self.table.num_rows // len(self.groups)

    def rows_of_groups(self, rows: jax.Array) -> jax.Array:
        """i32[G, B]: the table rows of requests ``rows`` i32[B]; -1 stays -1."""
        return rows_of_groups(self.table, rows, len(self.groups))


class Hits(NamedTuple):
    """Cached blocks that B requests begin with; those that hold anything already have none.

    Attributes:
        blocks: i32[H], request by request, for each its groups one after another, for each its columns; -1 where a
            group needs no block, which only leading columns may be. Padding -1.
        columns: i32[B], columns of each request.
    """

    blocks: jax.Array | np.ndarray
    columns: jax.Array | np.ndarray


class Extension(NamedTuple):
    """What ``extend`` did for B requests.

    Attributes:
        ok: bool[B]; a refused request holds what it held before.
        new_ids: i32[capacity], every block given that was no hit; padding -1.
        evicted: bool[capacity], those of them whose cached content was given up.
        copy_src: i32[G * B], shared blocks that are written next; -1 for none.
        copy_dst: i32[G * B], the request's own blocks that take their place, their content to be copied from
            ``copy_src`` before anything is written; -1 for none. Both None where ``extend`` was not asked to copy.
    """

    ok: jax.Array
    new_ids: jax.Array
    evicted: jax.Array
    copy_src: jax.Array | None
    copy_dst: jax.Array | None


def extend(
    state: GroupedRows,
    rows: jax.Array,
    lens: jax.Array,
    *,
    capacity: int,
    hits: Hits | None = None,
    copies: bool = False,
    ahead: jax.Array | None = None,
) -> tuple[GroupedRows, Extension]:
    """Give each request its hits and room for ``lens`` more tokens, in the order of the batch, all or nothing.

    Args:
        state: as it is.
        rows: i32[B], requests, none twice; -1 is padding.
        lens: i32[B], tokens to come after what is held or hit.
        capacity: static; most blocks given to all requests together, hits included.
        hits: cached blocks.
        copies: static; whether requests may share blocks that are not full, because one was forked from another. A
            request that writes into one gets a block of its own in its place.
        ahead: i32[B], tokens past those that each request gets blocks for too, as far as its row has columns.
    """
    pool, table, num_groups = state.pool, state.table, len(state.groups)
    config, block_size = table.config, table.config.block_size
    padding, row = rows < 0, jnp.maximum(rows, 0)
    held_tokens, held = (jnp.where(padding, 0, x[row]) for x in (table.num_tokens, table.num_blocks))
    lens = jnp.where(padding, 0, lens)
    hit_columns = jnp.zeros_like(held) if hits is None else jnp.where(padding, 0, hits.columns)
    total = held_tokens + hit_columns * block_size + lens
    reach = total if ahead is None else jnp.maximum(jnp.minimum(total + ahead, config.max_tokens_per_req), total)
    columns = jnp.maximum((reach + block_size - 1) // block_size - held - hit_columns, 0)
    possible = (lens >= 0) & (total <= config.max_tokens_per_req) & ((hit_columns == 0) | (held == 0))
    given, shared = columns, None
    if copies:
        own = table.blocks[state.rows_of_groups(row), jnp.maximum(held - 1, 0)]  # [G, B]
        shared = (held_tokens % block_size != 0) & (lens > 0) & (pool.ref_counts[jnp.maximum(own[0], 0)] > 1)
        given = columns + shared
    counts = jnp.where(possible, given * num_groups, -1)
    flat = None if hits is None else _named_hits(hits, num_groups)
    pool, admitted = pool.admit(
        counts,
        capacity=capacity,
        hits=None if flat is None else flat.ids,
        hit_offsets=None if flat is None else flat.offsets,
    )
    ok = admitted.ok

    # Where each id goes. A request's ids are its hits, then its new blocks, group by group.
    entry = rows_of_entries(admitted.row_offsets, capacity)
    request = jnp.minimum(entry, rows.shape[0] - 1)
    place = jnp.arange(capacity, dtype=jnp.int32) - admitted.row_offsets[request]
    if flat is not None:
        place -= jnp.where(ok, jnp.diff(flat.offsets), 0)[request]
    is_new = (entry < rows.shape[0]) & (place >= 0)
    per_group = jnp.maximum(given, 1)[request]
    group, index = (0, place) if num_groups == 1 else (place // per_group, place % per_group)
    column = (held + hit_columns)[request] + index - (0 if shared is None else shared[request])
    target = jnp.where(is_new, group * state.num_requests + row[request], table.num_rows)
    new_ids = jnp.where(is_new, admitted.ids, -1)
    blocks = table.blocks.at[target, column].set(new_ids, mode="drop")
    released = state.released
    if hits is not None:
        assert flat is not None
        kept = ok[jnp.minimum(flat.request, rows.shape[0] - 1)] & (flat.request < rows.shape[0])
        at_row = jnp.where(kept, flat.group * state.num_requests + row[flat.request], table.num_rows)
        blocks = blocks.at[at_row, flat.column].set(hits.blocks, mode="drop")
        not_needed = jnp.where(kept & (hits.blocks < 0), at_row, table.num_rows)
        released = released.at[not_needed].add(1, mode="drop")
    changed = state.rows_of_groups(jnp.where(ok & ~padding, rows, -1))
    changed = jnp.where(changed < 0, table.num_rows, changed)
    table = dataclasses.replace(
        table,
        blocks=blocks,
        num_blocks=table.num_blocks.at[changed].add(columns + hit_columns, mode="drop"),
        num_tokens=table.num_tokens.at[changed].add(hit_columns * block_size + lens, mode="drop"),
    )
    copy_src = copy_dst = None
    if shared is not None:
        copied = shared & ok
        copy_src = jnp.where(copied, own, -1).ravel()
        copy_dst = jnp.where(copied, table.blocks[state.rows_of_groups(row), jnp.maximum(held - 1, 0)], -1).ravel()
        pool, _ = pool.free(copy_src)
    state = dataclasses.replace(state, pool=pool, table=table, released=released)
    return state, Extension(ok, new_ids, admitted.evicted & is_new, copy_src, copy_dst)


class _NamedHits(NamedTuple):
    ids: jax.Array  # i32[H], without the columns that need no block
    offsets: jax.Array  # i32[B + 1] into ids
    request: jax.Array  # i32[H] of hits.blocks: B for padding
    group: jax.Array
    column: jax.Array


def _named_hits(hits: Hits, num_groups: int) -> _NamedHits:
    size, num_requests = hits.blocks.shape[0], hits.columns.shape[0]
    starts = offsets_from_lengths(jnp.asarray(hits.columns) * num_groups)
    request = rows_of_entries(starts, size)
    safe = jnp.minimum(request, num_requests - 1)
    place = jnp.arange(size, dtype=jnp.int32) - starts[safe]
    per_group = jnp.maximum(hits.columns[safe], 1)
    named = (hits.blocks >= 0) & (request < num_requests)
    lengths = jnp.zeros(num_requests, jnp.int32).at[request].add(named.astype(jnp.int32), mode="drop")
    rank = jnp.cumsum(named, dtype=jnp.int32) - 1
    ids = jnp.full(size, -1, jnp.int32).at[jnp.where(named, rank, size)].set(hits.blocks, mode="drop")
    return _NamedHits(ids, offsets_from_lengths(lengths), request, place // per_group, place % per_group)


def mark_cached(state: GroupedRows, ids: jax.Array) -> GroupedRows:
    """The content of blocks ``ids`` i32[n] is worth keeping when they become free; -1 is padding."""
    return dataclasses.replace(state, pool=state.pool.mark_cached(ids)[0])


def uncache(state: GroupedRows, ids: jax.Array) -> GroupedRows:
    """Forget the content of blocks ``ids`` i32[n]; -1 is padding."""
    return dataclasses.replace(state, pool=state.pool.uncache(ids)[0])


def release_out_of_sight(state: GroupedRows, provisional: jax.Array | None = None, *, capacity: int) -> GroupedRows:
    """Give back the blocks that no later token of their group can see.

    Args:
        state: as it is.
        provisional: i32[R], the last so many tokens of each request may be taken back. None: no tokens.
        capacity: static; most blocks given back in this call, the rest follows in later ones.
    """
    if all(group.keeps_all for group in state.groups):
        return state
    table, config = state.table, state.table.config
    tokens = table.num_tokens.reshape(len(state.groups), -1) - (0 if provisional is None else provisional)
    first = jnp.stack(
        [first_column(group, tokens[g], config.block_size) for g, group in enumerate(state.groups)]
    ).ravel()
    wanted = jnp.clip(first - state.released, 0)
    ends = jnp.minimum(jnp.cumsum(wanted, dtype=jnp.int32), capacity)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    row = rows_of_entries(offsets, capacity)
    real = row < table.num_rows
    safe = jnp.where(real, row, 0)
    column = state.released[safe] + jnp.arange(capacity, dtype=jnp.int32) - offsets[safe]
    ids = jnp.where(real, table.blocks[safe, jnp.clip(column, 0, config.max_num_blocks_per_req - 1)], -1)
    pool, _ = state.pool.free(ids)
    blocks = after(table.blocks, ids).at[row, column].set(-1, mode="drop")
    released = state.released + jnp.diff(offsets)
    return dataclasses.replace(state, pool=pool, table=dataclasses.replace(table, blocks=blocks), released=released)


def first_column(group: LayerGroup, num_tokens: Any, block_size: int) -> Any:
    """The first column that a token at position ``num_tokens`` i32[...], or any later one, can see."""
    if group.sliding_window is not None:
        return (num_tokens - group.sliding_window + 1).clip(0) // block_size
    if group.chunk_size is not None:
        return num_tokens // group.chunk_size * group.chunk_size // block_size
    return num_tokens * 0


def free(state: GroupedRows, mask: jax.Array, *, capacity: int) -> GroupedRows:
    """Drop every reference of the requests in ``mask`` bool[R], each row's last block first, and empty them.

    Args:
        state: as it is.
        mask: requests.
        capacity: static; no fewer than the blocks the requests hold in all groups together.
    """
    rows = jnp.tile(mask, len(state.groups))
    return _shorten(state, jnp.where(rows, 0, state.table.num_blocks), rows, capacity)


def truncate(state: GroupedRows, rows: jax.Array, num_tokens: jax.Array, *, capacity: int) -> GroupedRows:
    """Forget the tokens of requests ``rows`` i32[B] (-1 is padding) past ``num_tokens`` i32[B], and free their blocks.

    Args:
        state: as it is.
        rows: requests, none twice.
        num_tokens: at most what each holds.
        capacity: static; no fewer than the blocks that are freed.
    """
    table, block_size = state.table, state.table.config.block_size
    changed = state.rows_of_groups(rows)
    changed = jnp.where(changed < 0, table.num_rows, changed)
    keep = table.num_blocks.at[changed].set((num_tokens + block_size - 1) // block_size, mode="drop")
    tokens = table.num_tokens.at[changed].set(num_tokens, mode="drop")
    table = dataclasses.replace(table, num_tokens=tokens)
    return _shorten(dataclasses.replace(state, table=table), keep, jnp.zeros(table.num_rows, bool), capacity)


def give_back(state: GroupedRows, mask: jax.Array, *, capacity: int) -> GroupedRows:
    """Free the blocks of the requests in ``mask`` bool[R] past their tokens, at most ``capacity`` (static)."""
    table, block_size = state.table, state.table.config.block_size
    needed = (table.num_tokens + block_size - 1) // block_size
    keep = jnp.where(jnp.tile(mask, len(state.groups)), jnp.minimum(needed, table.num_blocks), table.num_blocks)
    return _shorten(state, keep, jnp.zeros(table.num_rows, bool), capacity)


def advance(state: GroupedRows, used: jax.Array) -> GroupedRows:
    """Every request has gained ``used`` i32[R] tokens, in blocks it held ahead of them."""
    tokens = state.table.num_tokens + jnp.tile(used, len(state.groups))
    return dataclasses.replace(state, table=dataclasses.replace(state.table, num_tokens=tokens))


def _shorten(state: GroupedRows, keep: jax.Array, cleared: jax.Array, capacity: int) -> GroupedRows:
    """Free the blocks of each row past its first ``keep`` i32[G * R], and empty the rows ``cleared`` bool[G * R]."""
    table = state.table
    offsets = offsets_from_lengths(table.num_blocks - keep)
    row = rows_of_entries(offsets, capacity)
    real = row < table.num_rows
    safe = jnp.where(real, row, 0)
    column = table.num_blocks[safe] - 1 - (jnp.arange(capacity, dtype=jnp.int32) - offsets[safe])
    column = jnp.clip(column, 0, table.config.max_num_blocks_per_req - 1)
    ids = jnp.where(real, table.blocks[safe, column], -1)
    pool, _ = state.pool.free(ids)
    blocks = after(table.blocks, ids).at[row, column].set(-1, mode="drop")
    table = dataclasses.replace(
        table, blocks=blocks, num_blocks=keep, num_tokens=jnp.where(cleared, 0, table.num_tokens)
    )
    released = jnp.where(cleared, 0, state.released)
    return dataclasses.replace(state, pool=pool, table=table, released=released)


def fork(state: GroupedRows, parent: jax.Array, child: jax.Array) -> GroupedRows:
    """Request ``child`` i32[], which must hold nothing, becomes a second holder of all that ``parent`` i32[] holds."""
    table = state.table
    src, dst = state.rows_of_groups(jnp.stack([parent])).ravel(), state.rows_of_groups(jnp.stack([child])).ravel()
    shared = table.blocks[src]
    pool, _ = state.pool.share(shared.ravel())
    table = dataclasses.replace(
        table,
        blocks=after(table.blocks, shared).at[dst].set(shared),
        num_blocks=table.num_blocks.at[dst].set(table.num_blocks[src]),
        num_tokens=table.num_tokens.at[dst].set(table.num_tokens[src]),
    )
    released = state.released.at[dst].set(state.released[src])
    return dataclasses.replace(state, pool=pool, table=table, released=released)
