"""The manager's pool and table on the host's XLA CPU device, and the jitted calls over them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache.allocation import extend_rows, free_rows, step_metadata
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.pool import BlockPool, check_invariants
from pyagent_kv_jax.tables import BlockTable

_State = tuple[BlockPool, BlockTable]


class ControlPlane:
    """Owns the control pytrees and donates them to each call. Not thread-safe: the manager's lock is above it.

    Which programs are compiled depends on the sizes a scheduler pads to, never on what a request holds.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        self._block_size = config.block_size
        table_config = config.table_config()
        self._free_capacity = table_config.max_num_blocks_per_req  # any one row fits
        host = DeviceType.CPU.devices()[0]
        with jax.default_device(host):
            state = (BlockPool.create(config.pool_blocks), BlockTable.create(table_config))
        # Committed: the numpy arguments of every call follow it to the host.
        self._state: _State = jax.device_put(state, host)

    def step(
        self, rows: np.ndarray, counts: np.ndarray, freed_rows: list[int], num_rows: int, num_tokens: int | None
    ) -> AttentionMetadata:
        """Free, extend and compute slots in one dispatch; the metadata's leaves are numpy arrays."""
        *earlier, last = self._batches_to_free(freed_rows)
        for batch in earlier:
            self._free(batch)
        self._state, metadata = _step(
            self._state,
            _padded(rows, num_rows, -1),
            _padded(counts, num_rows, 0),
            self._mask(last),
            free_capacity=self._free_capacity if last else 0,
            capacity=num_rows if num_tokens is None else num_rows + num_tokens // self._block_size,
            num_tokens=num_tokens,
        )
        return jax.tree.map(np.asarray, metadata)

    def admit(self, row: int, count: int) -> bool:
        """Extend one row without computing slots; whether it was served."""
        self._state, ok = _admit(self._state, np.int32(row), np.int32(count))
        return bool(ok)

    def free(self, rows: list[int]) -> None:
        """Drop the references of whole rows."""
        for batch in self._batches_to_free(rows):
            self._free(batch)

    def lengths(self) -> np.ndarray:
        """Tokens of every row, i32[max_num_reqs]; a copy, since the next call donates the original."""
        return np.array(self._state[1].num_tokens)

    def blocks_of(self, row: int) -> list[int]:
        """Block ids of one row."""
        table = np.asarray(self._state[1].get_row(row))
        return table[table >= 0].tolist()

    def num_free(self) -> int:
        """Blocks that an admission could take."""
        return int(self._state[0].num_free)

    def check_invariants(self) -> None:
        """Raise ``InvalidBlockError`` where pool and table contradict themselves or each other."""
        check_invariants(*self._state)

    def _free(self, rows: list[int]) -> None:
        self._state = _free(self._state, self._mask(rows), capacity=self._free_capacity)

    def _mask(self, rows: list[int]) -> np.ndarray:
        mask = np.zeros(self._state[1].config.max_num_reqs, bool)
        mask[rows] = True
        return mask

    def _batches_to_free(self, rows: list[int]) -> list[list[int]]:
        """``rows`` in batches whose blocks fit into one call's static capacity; at least one, perhaps empty."""
        if not rows:
            return [[]]
        held = np.array(self._state[1].num_blocks)[rows]
        batches: list[list[int]] = [[]]
        room = self._free_capacity
        for row, blocks in zip(rows, held, strict=True):
            if blocks > room:
                batches.append([])
                room = self._free_capacity
            batches[-1].append(row)
            room -= int(blocks)
        return batches


@partial(jax.jit, donate_argnums=0, static_argnames=("free_capacity", "capacity", "num_tokens"))
def _step(
    state: _State,
    rows: jax.Array,
    counts: jax.Array,
    freed: jax.Array,
    *,
    free_capacity: int,
    capacity: int,
    num_tokens: int | None,
) -> tuple[_State, AttentionMetadata]:
    """``rows`` i32[B] are served in their order; -1 is padding."""
    pool, table = state
    if free_capacity:
        pool, table, _ = free_rows(pool, table, freed, capacity=free_capacity)
    pool, table, ok = extend_rows(pool, table, counts, capacity=capacity, rows=rows)
    ok &= rows >= 0
    return (pool, table), step_metadata(table, rows, jnp.where(ok, counts, 0), ok, num_tokens)


@partial(jax.jit, donate_argnums=0)
def _admit(state: _State, row: jax.Array, count: jax.Array) -> tuple[_State, jax.Array]:
    pool, table = state
    capacity = table.config.max_num_blocks_per_req
    pool, table, ok = extend_rows(pool, table, count[None], capacity=capacity, rows=row[None])
    return (pool, table), ok[0]


@partial(jax.jit, donate_argnums=0, static_argnames="capacity")
def _free(state: _State, rows: jax.Array, *, capacity: int) -> _State:
    pool, table, _ = free_rows(*state, rows, capacity=capacity)
    return pool, table


def _padded(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out
