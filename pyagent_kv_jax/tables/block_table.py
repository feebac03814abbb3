"""Which block holds which part of which sequence, as a rectangle: the form that other floors read directly."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import KVCacheError
from pyagent_kv_jax.tables.in_place import after, erase_rows
from pyagent_kv_jax.tables.row_methods import RowMethods
from pyagent_kv_jax.tables.table_storage import Entries

_ROWS_EMPTIED_TOGETHER = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "num_blocks", "num_tokens"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class BlockTable(RowMethods):
    """R rows of up to W blocks. Immutable: each change returns a new table and leaves this one as it was.

    Called with plain values, a method raises when an argument is wrong. Traced, where nothing can raise, the wrong
    argument changes nothing (reads give -1 or 0), and ``checkify`` reports it in ``checking()``.

    Attributes:
        blocks: i32[R, W], block ids; -1 where there is none, as past a row's last block.
        num_blocks: i32[R], blocks of each row.
        num_tokens: i32[R], tokens of each row.
        config: sizes, static.
    """

    blocks: jax.Array

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

    # -- storage

    def read_blocks(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """See ``TableStorage``."""
        return self.blocks[rows, columns]

    def write_blocks(self, entries: Entries, ok: jax.Array) -> tuple[Self, jax.Array]:
        """See ``TableStorage``. There is always room."""
        row = jnp.where(entries.in_groups(ok), entries.rows, self.num_rows)
        blocks = self.blocks.at[row, entries.columns].set(entries.block_ids, mode="drop")
        return dataclasses.replace(self, blocks=blocks), ok

    def empty_rows(self, mask: jax.Array) -> Self:
        """See ``TableStorage``. The cost follows the rows emptied, not the table."""
        emptied = jnp.nonzero(mask, size=self.num_rows, fill_value=self.num_rows)[0].astype(jnp.int32)
        together = min(_ROWS_EMPTIED_TOGETHER, self.num_rows)
        return dataclasses.replace(self, blocks=erase_rows(self.blocks, emptied, jnp.sum(mask), together))

    def exchange_rows(self, target: jax.Array, source: jax.Array) -> Self:
        """See ``TableStorage``."""
        return dataclasses.replace(self, blocks=self.blocks.at[target].set(self.blocks[source], mode="drop"))

    def dense_rows(self, rows: jax.Array | None, max_blocks: int) -> jax.Array:
        """See ``TableStorage``."""
        columns = min(max_blocks, self.width)
        if rows is None:
            blocks = self.blocks[:, :columns]
        else:
            row = jnp.clip(rows, 0, self.num_rows - 1)
            read = jax.vmap(lambda one: lax.dynamic_slice(self.blocks, (one, 0), (1, columns))[0])  # not row and cut
            blocks = jnp.where((row == rows)[:, None], read(row), -1)
        return jnp.pad(blocks, ((0, 0), (0, max_blocks - columns)), constant_values=-1)

    def after_reading(self, read: jax.Array) -> Self:
        """See ``TableStorage``."""
        return dataclasses.replace(self, blocks=after(self.blocks, read))

    def no_room_error(self, rows: np.ndarray, columns: np.ndarray) -> KVCacheError | None:
        """See ``TableStorage``. There is always room."""
        return None
