"""The arrays of a ``DistributedBlockTable``, and its changes as jitted calls over the mesh."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.cache.allocation import step_metadata
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.distributed.on_ranks import on_ranks
from pyagent_kv_jax.distributed.owned.owned_blocks import GivenBlocks, allocate_owned, free_owned, local_ids
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.pool.invariants import broken_invariants
from pyagent_kv_jax.tables import BlockTable

Owned = TypeVar("Owned", bound="OwnedTable")


@dataclasses.dataclass(frozen=True)
class OwnedTable:
    """See ``DistributedBlockTable``, which has the attributes' meaning and the methods."""

    table: BlockTable
    pools: BlockPool
    mesh: Mesh
    axis: str
    worker_id: int

    @property
    def num_workers(self) -> int:
        """D."""
        return self.mesh.shape[self.axis]

    @property
    def num_blocks(self) -> int:
        """N, of all devices together."""
        return self.pools.num_blocks * self.num_workers

    def on_devices(self, function: Any, arguments: tuple[Any, ...], out_specs: Any) -> Any:
        """``function(table, the device's own pool, *arguments)`` on every device of the mesh.

        Arguments are the same on all; results lie as ``out_specs`` says, a pool of each device's own at ``P(axis)``.
        """

        def run(table: BlockTable, pools: BlockPool, arguments: Any) -> Any:
            results = function(table, jax.tree.map(lambda x: x[0], pools), *arguments)
            return jax.tree.map(_stacked, results, is_leaf=_is_pool)

        mapped = on_ranks(run, self.mesh, (P(), P(self.axis), P()), out_specs)
        return mapped(self.table, self.pools, arguments)


def _is_pool(value: Any) -> bool:
    return isinstance(value, BlockPool)


def _stacked(value: Any) -> Any:
    return jax.tree.map(lambda x: x[None], value) if _is_pool(value) else value


def _homes(owned: Owned, rows: jax.Array, prefer_local: bool) -> jax.Array:
    """i32[B]: the device of each row's last block; of an empty row ``worker_id``; -1 without a preference."""
    if not prefer_local:
        return jnp.full(rows.shape, -1, jnp.int32)
    table = owned.table
    row = jnp.clip(rows, 0, table.num_rows - 1)
    last = table.blocks[row, jnp.maximum(table.num_blocks[row] - 1, 0)]
    return jnp.where(last >= 0, last // owned.pools.num_blocks, owned.worker_id)


@partial(jax.jit, static_argnums=(5, 6))
def allocate(
    owned: Owned,
    rows: jax.Array,
    counts: jax.Array,
    tokens: jax.Array,
    devices: jax.Array | None,
    prefer_local: bool,
    capacity: int,
) -> tuple[Owned, GivenBlocks]:
    """``allocate_owned`` on the mesh; ``devices`` None: see ``_homes``."""
    devices = _homes(owned, rows, prefer_local) if devices is None else devices
    allocate = partial(allocate_owned, axis_name=owned.axis, capacity=capacity)
    table, pools, given = owned.on_devices(allocate, (rows, counts, tokens, devices), (P(), P(owned.axis), P()))
    return dataclasses.replace(owned, table=table, pools=pools), given


@partial(jax.jit, static_argnums=(3, 4))
def extend(
    owned: Owned, lens: jax.Array, devices: jax.Array | None, prefer_local: bool, num_tokens: int | None
) -> tuple[Owned, AttentionMetadata]:
    """Blocks for ``lens`` i32[R] more tokens, as ``cache.allocation.extend_rows``, and the step's metadata."""
    table, block_size = owned.table, owned.table.config.block_size
    rows = jnp.arange(table.num_rows, dtype=jnp.int32)
    capacity = len(rows) + (num_tokens or 0) // block_size
    longest = 1 if num_tokens is None else num_tokens
    possible = lens <= longest
    if num_tokens is not None:
        possible &= jnp.cumsum(jnp.clip(lens, 0, num_tokens + 1)) <= num_tokens
    possible &= (lens >= 0) & (lens <= table.config.max_tokens_per_req - table.num_tokens)
    blocks = -(-(table.num_tokens + jnp.where(possible, lens, 0)) // block_size) - table.num_blocks
    counts = jnp.where(possible, jnp.maximum(blocks, 0), -1)
    owned, given = allocate(owned, rows, counts, lens, devices, prefer_local, min(capacity, owned.num_blocks))
    return owned, step_metadata(owned.table, rows, jnp.maximum(lens, 0), given.ok, num_tokens)


@jax.jit
def free(owned: Owned, rows: jax.Array) -> tuple[Owned, jax.Array]:
    """``free_owned`` on the mesh."""
    free = partial(free_owned, axis_name=owned.axis)
    table, pools, ok = owned.on_devices(free, (rows,), (P(), P(owned.axis), P()))
    return dataclasses.replace(owned, table=table, pools=pools), ok


@jax.jit
def num_free(owned: Owned) -> jax.Array:
    """i32[D]: free blocks of each device."""
    return owned.on_devices(lambda _, pool: lax.all_gather(pool.num_free, owned.axis), (), P())


@jax.jit
def broken(owned: Owned) -> dict[str, jax.Array]:
    """What is broken -> bool[D]."""

    def on_device(table: BlockTable, pool: BlockPool) -> dict[str, jax.Array]:
        column = jnp.arange(table.width)
        named = jnp.where(column < table.num_blocks[:, None], table.blocks, -1)
        local = local_ids(named, lax.axis_index(owned.axis), pool.num_blocks)
        nowhere = pool.num_blocks
        times = jnp.zeros(pool.num_blocks, jnp.int32).at[jnp.where(local < 0, nowhere, local)].add(1, mode="drop")
        outside = (column < table.num_blocks[:, None]) & ((named < 0) | (named >= owned.num_blocks))
        room = table.num_blocks * table.config.block_size
        broken = broken_invariants(pool) | {
            "a block has not as many references as rows name it": times != pool.ref_counts,
            "a row names what is no block": outside,
            "a row is not padded with -1": (column >= table.num_blocks[:, None]) & (table.blocks != -1),
            "a row has more tokens than its blocks hold": (table.num_tokens < 0) | (table.num_tokens > room),
        }
        return {what: lax.all_gather(jnp.any(where), owned.axis) for what, where in broken.items()}

    return owned.on_devices(on_device, (), P())
