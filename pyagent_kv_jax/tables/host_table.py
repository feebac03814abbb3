"""A block table on the host's XLA CPU device, for objects that change it call by call."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.tables.block_ids import new_block_ids
from pyagent_kv_jax.tables.block_table import BlockTable
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU, made_on_host
from pyagent_kv_jax.tables.padding import padded
from pyagent_kv_jax.tables.refusals import raise_if, why_not_appended, why_not_extended
from pyagent_kv_jax.tables.row_methods import RowMethods
from pyagent_kv_jax.tables.rows import append_rows, clear_rows
from pyagent_kv_jax.tables.sparse_block_table import SparseBlockTable


class HostTable:
    """Owns a table of either form and donates it to each change. Not thread-safe: a lock is above it.

    A table that was handed out is copied before the next change, and so stays what it is.
    """

    def __init__(self, config: BlockTableConfig, sparse_blocks: int | None = None) -> None:
        """Empty rows: dense, or sparse with room for ``sparse_blocks`` blocks.

        Raises:
            ConfigError: a count of blocks that is none.
            DeviceUnavailableError: JAX's CPU backend is hidden.
        """
        self._table: Any = made_on_host(
            lambda: (
                BlockTable.create(config) if sparse_blocks is None else SparseBlockTable.create(config, sparse_blocks)
            )
        )
        self._is_lent = False

    @property
    def table(self) -> Any:
        """The table as it is now, to keep."""
        self._is_lent = True
        return self._table

    @property
    def methods(self) -> RowMethods:
        """The table, valid until the next change."""
        return self._table

    def num_blocks(self) -> np.ndarray:
        """Blocks of every row, i32[R]; valid until the next change."""
        return np.asarray(self._table.num_blocks)

    def num_tokens(self) -> np.ndarray:
        """Tokens of every row, i32[R]; valid until the next change."""
        return np.asarray(self._table.num_tokens)

    def check_append(self, row: int, block_ids: ArrayLike, num_tokens: ArrayLike) -> tuple[np.ndarray, int]:
        """Raise what ``BlockTable.append_row`` would raise; else blocks i32[n] and tokens, checked."""
        ids, tokens = new_block_ids(block_ids), int(integer("num_tokens", num_tokens))
        raise_if(why_not_appended(self._table, row, ids, tokens))
        return ids[: np.size(block_ids)], tokens

    def check_extend(self, row: int, num_blocks: int, num_tokens: int) -> None:
        """Raise what ``BlockTable.append_row`` would raise for that many blocks."""
        raise_if(why_not_extended(self._table, row, num_blocks, num_tokens))

    def append(self, row: int, ids: np.ndarray, num_tokens: int) -> None:
        """Append blocks i32[n] and tokens that have been checked."""
        offsets, tokens, rows = (np.array(x, np.int32) for x in ([0, len(ids)], [num_tokens], [row]))
        self._table, ok = _append(self._owned(), padded(ids), offsets, tokens, rows)
        assert ok.all()

    def clear(self, row: int) -> np.ndarray:
        """Empty a row; the blocks it had, i32[n], in their order."""
        ids = np.asarray(self._table.get_row(row))[: self.num_blocks()[row]].copy()
        if len(ids) or self.num_tokens()[row]:
            self._table = _clear(self._owned(), np.int32(row))
        return ids

    def _owned(self) -> Any:
        table = jax.tree.map(jnp.copy, self._table) if self._is_lent else self._table
        self._is_lent = False
        return table


_append = jax.jit(append_rows, donate_argnums=0, compiler_options=CONTROL_STEP_ON_CPU)


@partial(jax.jit, donate_argnums=0, compiler_options=CONTROL_STEP_ON_CPU)
def _clear(table: RowMethods, row: jax.Array) -> RowMethods:
    return clear_rows(table, jnp.arange(table.num_rows) == row)
