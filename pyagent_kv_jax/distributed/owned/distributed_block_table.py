"""``DistributedBlockTable``: one logical pool whose blocks live on the devices of a mesh axis."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integers, static_count
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.distributed.owned import owned_table
from pyagent_kv_jax.distributed.owned.owned_blocks import GivenBlocks
from pyagent_kv_jax.distributed.owned.owned_table import OwnedTable
from pyagent_kv_jax.errors import (
    ConfigError,
    InvalidArgumentError,
    InvalidBlockError,
    OutOfBlocksError,
    UnknownRequestError,
    is_concrete,
    require,
)
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.pool.admission import checked_capacity
from pyagent_kv_jax.pool.allocation_strategy import node_of_block
from pyagent_kv_jax.tables import BlockTable
from pyagent_kv_jax.tables.padding import power_of_two
from pyagent_kv_jax.tables.refusals import raise_if, why_not_extended


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "pools"],
    meta_fields=["mesh", "axis", "worker_id"],
)
@dataclasses.dataclass(frozen=True)
class DistributedBlockTable(OwnedTable):
    """R rows of blocks that live on D devices. Immutable: each change returns a new one.

    Of N blocks, device d of the axis owns ids ``d * N / D`` to ``(d + 1) * N / D - 1``, as the nodes of a NUMA-aware
    pool do. It alone keeps account of them; the table is replicated. Every change is one jitted call on global arrays,
    with plain values or inside the caller's ``jit``, in one process or in all processes of the mesh alike: nothing is
    decided but from numbers that all devices have (``spill_plan.py`` has the rule).

    Called with plain values, a method raises when something is wrong, and nothing has changed. Traced, ``ok`` says so.

    Attributes:
        table: replicated over the mesh.
        pools: each device's own blocks: a ``BlockPool`` of N / D, every array with an axis of D before, which is
            sharded over ``axis``.
        mesh: static.
        axis: static, its axis of D devices; other axes hold copies.
        worker_id: static, the device that is local where none is named; the same in every process.
    """

    @classmethod
    def create(
        cls,
        config: BlockTableConfig,
        num_workers: int,
        worker_id: int = 0,
        *,
        num_blocks: int,
        mesh: Mesh | None = None,
        axis: str = "workers",
    ) -> Self:
        """Empty rows, free blocks.

        Args:
            config: of the table.
            num_workers: D.
            worker_id: see the class.
            num_blocks: N, of all devices together; a multiple of D.
            mesh: has ``axis``, of D devices. None: one of the first D devices.
            axis: a name.

        Raises:
            ConfigError: sizes that do not fit each other, or a mesh without such an axis.
        """
        workers = static_count("num_workers", num_workers, 1)
        if mesh is None:
            if workers > len(jax.devices()):
                raise ConfigError(
                    f"num_workers: got {workers}, want at most {len(jax.devices())}, the devices there are"
                )
            mesh = jax.make_mesh((workers,), (axis,), axis_types=(AxisType.Auto,), devices=jax.devices()[:workers])
        if axis not in mesh.axis_names:
            raise ConfigError(f"axis: got {axis!r}, want one of the mesh's axes {mesh.axis_names}")
        if mesh.shape[axis] != workers:
            raise ConfigError(f"num_workers: got {workers}, want {mesh.shape[axis]}, the devices of axis {axis!r}")
        if not 0 <= static_count("worker_id", worker_id) < workers:
            raise ConfigError(f"worker_id: got {worker_id}, want 0 to {workers - 1}")
        if static_count("num_blocks", num_blocks, 1) % workers:
            raise ConfigError(f"num_blocks: got {num_blocks}, want a multiple of {workers} devices")

        def empty() -> tuple[BlockTable, BlockPool]:
            one = BlockPool.create(num_blocks // workers)
            return BlockTable.create(config), jax.tree.map(lambda x: jnp.tile(x, (workers,) + (1,) * x.ndim), one)

        shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P(axis))
        table, pools = jax.jit(empty, out_shardings=shardings)()
        return cls(table, pools, mesh, axis, int(worker_id))

    @property
    def num_free(self) -> jax.Array:
        """i32[D]: free blocks of each device."""
        return owned_table.num_free(self)

    # -- giving and taking

    def allocate_blocks(
        self,
        row_idx: ArrayLike,
        num_blocks: ArrayLike,
        prefer_local: bool = True,
        *,
        devices: ArrayLike | None = None,
        num_tokens: ArrayLike | None = None,
        capacity: int | None = None,
    ) -> tuple[Self, GivenBlocks]:
        """Append new blocks to rows: each row's own device first, then what others have; see ``plan_spill``.

        Args:
            row_idx: i32[B], or one row; -1 is padding.
            num_blocks: i32[B], or one count.
            prefer_local: static. True: a row prefers the device of its last block, an empty one ``worker_id``. False:
                none; its blocks come from the devices that have most.
            devices: i32[B], the device each row prefers instead; -1: none.
            num_tokens: i32[B], tokens that the rows gain. None: none yet.
            capacity: static; the most blocks given in all. None: those asked for, or traced what B rows can hold.

        Returns:
            (table, given), ``given`` as wide as ``capacity``.

        Raises (with plain values; traced: ``given.ok``, by row):
            UnknownRequestError: no such row.
            InvalidArgumentError: a row named twice, a negative count, a device that is not there, more tokens than the
                row's blocks hold.
            RequestTooLongError: the row has no columns left for so many.
            OutOfBlocksError: all devices together have too few.
            ShapeMismatchError: not equally many integers of each.
        """
        rows = integers("row_idx", _batch(row_idx))
        size = len(rows)
        counts = integers("num_blocks", _batch(num_blocks), size)
        tokens = np.zeros(size, np.int32) if num_tokens is None else integers("num_tokens", _batch(num_tokens), size)
        chosen = None if devices is None else integers("devices", _batch(devices), size)
        asked = (rows, counts, tokens) if chosen is None else (rows, counts, tokens, chosen)
        if capacity is None:
            capacity = min(size * self.table.width, self.num_blocks)
            if is_concrete(counts):
                capacity = min(capacity, power_of_two(int(np.clip(np.asarray(counts), 0, self.table.width).sum())))
        limit = checked_capacity(capacity, size)
        new, given = owned_table.allocate(self, rows, counts, tokens, chosen, bool(prefer_local), limit)
        if is_concrete(given.ok, *asked):
            self._raise_if_refused(given, limit, *(np.asarray(x) for x in asked))
        return new, given

    def extend(
        self,
        lens: ArrayLike,
        *,
        num_tokens: int | None = None,
        devices: ArrayLike | None = None,
        prefer_local: bool = True,
    ) -> tuple[Self, AttentionMetadata]:
        """Make room for a step's tokens, as ``PagedKVCache.extend``: what ``OwnedKVPages.attend`` needs of it.

        Args:
            lens: i32[R], new tokens of each row, 0 for rows that take no part.
            num_tokens: static; length of the step's token arrays. None: decode layout, token r belongs to row r.
            devices: i32[R], as for ``allocate_blocks``.
            prefer_local: likewise.

        Returns:
            (table, metadata). ``metadata.ok`` bool[R] says which rows were served; it is never raised.

        Raises:
            ShapeMismatchError: not R integers.
        """
        rows = self.table.num_rows
        wanted = integers("lens", lens, rows)
        chosen = None if devices is None else integers("devices", devices, rows)
        size = None if num_tokens is None else static_count("num_tokens", num_tokens)
        return owned_table.extend(self, wanted, chosen, bool(prefer_local), size)

    def free(self, row_idx: ArrayLike) -> tuple[Self, jax.Array]:
        """Empty rows ``row_idx`` i32[B] (or one; -1 is padding) and give their blocks back to their owners.

        Returns:
            (table, ok bool[B]); a refused row keeps its blocks.

        Raises (with plain values; traced: ``ok``):
            UnknownRequestError: no such row, or it holds nothing.
            InvalidArgumentError: a row named twice.
            ShapeMismatchError: not integers.
        """
        rows = integers("row_idx", _batch(row_idx))
        new, ok = owned_table.free(self, rows)
        if is_concrete(ok, rows) and not np.all(np.asarray(ok)):
            row = self._checked_row(np.asarray(rows), np.asarray(ok))
            raise UnknownRequestError(f"row {row}: holds nothing, want a row that holds blocks")
        return new, ok

    # -- reading

    def get_block_location(self, block_id: ArrayLike) -> jax.Array:
        """i32[...]: index on the axis of the device that owns each block; traced, -1 for an id outside the pool.

        Raises:
            InvalidBlockError: an id outside the pool.
            ShapeMismatchError: not integers.
        """
        devices = node_of_block(block_id, self.num_blocks, self.num_workers)
        if is_concrete(devices) and np.any(np.asarray(devices) < 0):
            wrong = np.asarray(block_id)[np.asarray(devices) < 0].ravel()[0]
            raise InvalidBlockError(f"block_id: got {wrong}, want 0 to {self.num_blocks - 1}")
        return devices

    def is_local(self, block_id: ArrayLike, device: ArrayLike | None = None) -> jax.Array:
        """bool[...]: whether ``device`` (None: ``worker_id``) owns each block. Raises as ``get_block_location``.

        Raises:
            InvalidArgumentError: there is no such device.
        """
        here: Any = self.worker_id if device is None else device
        whole = jnp.issubdtype(jnp.asarray(here).dtype, jnp.integer)
        require(
            whole & (jnp.asarray(here) >= 0) & (jnp.asarray(here) < self.num_workers),
            InvalidArgumentError,
            f"device: got {device}, want 0 to {self.num_workers - 1}",
        )
        return self.get_block_location(block_id) == here

    def check_invariants(self) -> None:
        """Raise unless every device's pool is sound and has the very references that the rows hold. O(N).

        Raises:
            InvalidBlockError: something is broken; says what, and on which devices.
        """
        broken = {what: np.flatnonzero(np.asarray(where)) for what, where in owned_table.broken(self).items()}
        lines = [f"{what}, on devices {at.tolist()}" for what, at in broken.items() if len(at)]
        if lines:
            raise InvalidBlockError(f"{self.num_workers} pools of {self.pools.num_blocks} blocks: " + "; ".join(lines))

    # -- inside

    def _raise_if_refused(
        self,
        given: GivenBlocks,
        capacity: int,
        rows: np.ndarray,
        counts: np.ndarray,
        tokens: np.ndarray,
        devices: np.ndarray | None = None,
    ) -> None:
        ok = np.asarray(given.ok)
        if ok.all():
            return
        row, first = self._checked_row(rows, ok), np.flatnonzero(~ok)[0]
        count, free = int(counts[first]), int(np.asarray(self.num_free).sum())
        if count < 0:
            raise InvalidArgumentError(f"row {row}: got a request for {count} blocks, want 0 or more")
        if devices is not None and not -1 <= devices[first] < self.num_workers:
            raise InvalidArgumentError(f"devices: got {devices[first]}, want 0 to {self.num_workers - 1}, or -1")
        raise_if(why_not_extended(self.table, row, count, int(tokens[first])))
        before = int(np.where(ok, counts, 0)[:first].sum())
        raise OutOfBlocksError(
            f"row {row}: got a request for {count} blocks, want at most {min(free, capacity) - before}:"
            f" {free} are free on {self.num_workers} devices, {capacity} may be given, rows before it get {before}"
        )

    def _checked_row(self, rows: np.ndarray, ok: np.ndarray) -> int:
        """The first refused row, if it is a row and named once."""
        row = int(rows[np.flatnonzero(~ok)[0]])
        if not 0 <= row < self.table.num_rows:
            raise UnknownRequestError(f"row: got {row}, want 0 to {self.table.num_rows - 1}")
        if (rows == row).sum() > 1:
            raise InvalidArgumentError(f"row_idx: got row {row} twice, want each row once")
        return row


def _batch(value: ArrayLike) -> Any:
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    return array[None] if array.ndim == 0 else array
