"""``PagedKVCache``: pages, table and pool in one pytree, for use inside a user's own ``jit`` and ``scan``."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer, integers, layer_index, shown
from pyagent_kv_jax.cache.allocation import extend_rows, free_rows, step_metadata
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.block_size_change import change_block_size
from pyagent_kv_jax.cache.cache_display import cache_html, cache_line
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    UnknownRequestError,
    is_concrete,
    require,
)
from pyagent_kv_jax.pool import BlockPool, check_invariants
from pyagent_kv_jax.tables import BlockTable


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "pool", "table"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class PagedKVCache:
    """A paged KV cache whose every change is a new value, so that it can be a scan's carry and be donated.

    Rows are named by index: a ``request_id`` here is a row of the table, 0 to ``config.max_num_reqs - 1``. String ids
    are the manager's.

    >>> @partial(jax.jit, donate_argnums=1)
    ... def step(params, cache, tokens, lens):
    ...     cache, meta = cache.extend(lens)                       # pool, table and slots, once
    ...     return nnx.merge(graph, params)(tokens, cache, meta)   # each layer: cache.attend(layer, q, k, v, meta)

    Attributes:
        pages: K and V; on a mesh, ``distributed.ShardedKVPages``.
        pool: which block is whose.
        table: position to block.
        config: static.
    """

    pages: KVPages
    pool: BlockPool
    table: BlockTable
    config: KVCacheConfig

    def __repr__(self) -> str:
        return cache_line(self)

    def _repr_html_(self) -> str:
        return cache_html(self)

    @classmethod
    def create(cls, config: KVCacheConfig, pages: Any = None) -> Self:
        """An empty cache.

        Args:
            config: sizes.
            pages: made for it, ``distributed.ShardedKVPages`` say. None: ``KVPages`` on ``config.device``.

        Raises:
            DeviceUnavailableError: this process has no such device.
        """
        pages = KVPages.create(config) if pages is None else pages
        return cls(pages, BlockPool.create(config.pool_blocks), BlockTable.create(config.table_config()), config)

    # -- inside a step -----------------------------------------------------------------------------------------

    def extend(
        self, lens: ArrayLike, *, num_tokens: int | None = None, order: jax.Array | None = None
    ) -> tuple[Self, AttentionMetadata]:
        """Make room for this step's tokens and say where each goes.

        Args:
            lens: i32[R], new tokens of each row, 0 for rows that take no part.
            num_tokens: static; length of the step's token arrays, in which the rows' tokens stand one row after
                another. None: decode layout, token r belongs to row r, at most one a row.
            order: i32[R], rows in the order they are served; None: 0 to R - 1.

        Returns:
            (cache, metadata). ``metadata.ok`` bool[R] says which rows were served. A refused row keeps what it had;
            its tokens keep their place in the batch, but are written nowhere and attend to nothing. A count that is
            negative, above one in decode layout, past ``num_tokens``, or past ``config.max_model_len`` is refused.
        """
        lens = jnp.asarray(integers("lens", lens))
        rows = jnp.arange(self.config.max_num_reqs, dtype=jnp.int32)
        if lens.shape != rows.shape:
            raise InvalidArgumentError(f"lens: got shape {lens.shape}, want {rows.shape}, one count a row")
        if num_tokens is None:
            possible, capacity = lens <= 1, rows.size
        else:
            possible = jnp.cumsum(jnp.maximum(lens, 0)) <= num_tokens
            capacity = rows.size + num_tokens // self.config.block_size
        possible &= lens <= self.config.max_model_len - self.table.num_tokens
        wanted = jnp.where(possible, lens, -1)
        pool, table, ok = extend_rows(self.pool, self.table, wanted, capacity=capacity, order=order)
        metadata = step_metadata(table, rows, jnp.maximum(lens, 0), ok, num_tokens)
        return dataclasses.replace(self, pool=pool, table=table), metadata

    def write(self, layer: ArrayLike, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> Self:
        """Store K and V of one layer; see ``KVPages.write``."""
        return dataclasses.replace(self, pages=self.pages.write(layer, k, v, slot_mapping))

    def attend(
        self, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, **options: Any
    ) -> tuple[jax.Array, Self]:
        """Store K and V of one layer, then attend, causally, over all that each row holds.

        Args:
            layer: i32[], 0 to ``config.num_layers - 1``; may be traced. Traced, another stores nothing and gives zeros.
            q: [T, q_heads, head_dim], the tokens of all rows as ``extend`` laid them out: no batch axis. After rope, by
                ``meta.positions``.
            k: [T, kv_heads, head_dim], after rope; not repeated for grouped heads.
            v: [T, kv_heads, v_head_dim].
            meta: of this step, from ``extend``.
            **options: ``scale``, ``sliding_window``, ``chunk_size``, ``logits_soft_cap``, ``sinks``: see
                ``KVPages.attend``. There is no mask.

        Returns:
            ([T, q_heads, v_head_dim] of q's dtype, the new cache). Queries of a refused row get zeros.

        Raises:
            ShapeMismatchError: shapes that do not fit the cache or the step's tokens.
        """
        out, pages = self.pages.attend(layer, q, k, v, meta, **options)
        return out, dataclasses.replace(self, pages=pages)

    def free_rows(self, rows: jax.Array, *, capacity: int | None = None) -> tuple[Self, jax.Array]:
        """Give back everything the rows in the mask ``rows`` bool[R] hold.

        Args:
            rows: a mask, not indices.
            capacity: static; most blocks freed at once. None: the whole pool's.

        Returns:
            (cache, ok bool[R]); a row for whose blocks ``capacity`` has no room left is refused and keeps them.

        Raises:
            ShapeMismatchError: not such a mask.
        """
        mask = jnp.asarray(rows)
        if mask.dtype != jnp.bool_ or mask.shape != (self.config.max_num_reqs,):
            got = f"{mask.dtype}{list(mask.shape)}"
            raise ShapeMismatchError(f"rows: got {got}, want a mask, bool[{self.config.max_num_reqs}]")
        limit = self.config.pool_blocks if capacity is None else capacity
        pool, table, ok = free_rows(self.pool, self.table, mask, capacity=limit)
        return dataclasses.replace(self, pool=pool, table=table), ok

    # -- block sizes -------------------------------------------------------------------------------------------

    def with_block_size(self, block_size: int) -> Self:
        """The same content in blocks of another size; outside ``jit``. The pages are donated: use the result.

        A smaller size that divides the present one moves nothing; else what does not stand in runs already is copied,
        by one call. Blocks set aside past a row's tokens, and cached content, are given up. Costs O(pool) on the host.

        Args:
            block_size: tokens; a multiple of the kernel block size.

        Raises:
            ConfigError: not such a multiple, or more than all the pages hold.
            InvalidArgumentError: called under a transformation.
            OutOfBlocksError, RequestTooLongError: the rows do not fit into blocks of this size.
            InvalidBlockError: references that no row holds would be lost.
        """
        if not is_concrete(self):
            raise InvalidArgumentError("with_block_size: got traced arrays, want a call outside jit: shapes change")
        config = self.config.with_block_size(block_size)
        if config.block_size == self.config.block_size:
            return self
        table_config = config.table_config()
        change = change_block_size(
            np.asarray(self.table.blocks),
            np.asarray(self.table.num_tokens),
            np.asarray(self.pool.ref_counts),
            old_size=self.config.block_size,
            new_size=config.block_size,
            page_size=config.page_size,
            num_blocks=config.pool_blocks,
            width=table_config.max_num_blocks_per_req,
        )
        pool = BlockPool.with_references(change.ref_counts)
        table = BlockTable(
            blocks=jnp.asarray(change.tables),
            num_blocks=jnp.asarray(change.num_blocks),
            num_tokens=self.table.num_tokens,
            config=table_config,
        )
        return dataclasses.replace(self, pages=change.move(self.pages, config), pool=pool, table=table, config=config)

    # -- one row -----------------------------------------------------------------------------------------------

    def allocate_for_request(self, request_id: ArrayLike, num_tokens: ArrayLike) -> Self:
        """Give an empty row the blocks for its first ``num_tokens`` tokens.

        Raises (outside ``jit``; inside, a refused call changes nothing):
            UnknownRequestError: no such row.
            InvalidArgumentError: the row is not empty, or a row or count is negative or not an integer.
            RequestTooLongError: more than a row or the pool can hold.
            OutOfBlocksError: too few free blocks.
        """
        row = self._checked_row(request_id)
        empty = self.table.num_blocks[row] == 0
        require(empty, InvalidArgumentError, f"row {shown(row)}: holds blocks already, want an empty row")
        return self._extend_row(row, num_tokens, empty)

    def extend_allocation(self, request_id: ArrayLike, additional_tokens: ArrayLike) -> Self:
        """Make room for ``additional_tokens`` more tokens in a row. Raises as ``allocate_for_request``."""
        return self._extend_row(self._checked_row(request_id), additional_tokens, True)

    def free_request(self, request_id: ArrayLike) -> Self:
        """Drop a row's references and empty it.

        Raises (outside ``jit``; inside, a refused call changes nothing):
            UnknownRequestError: no such row, or it holds nothing.
        """
        row = self._checked_row(request_id)
        held = self.table.num_blocks[row] > 0
        require(held, UnknownRequestError, f"row {shown(row)}: holds nothing, want a row that holds blocks")
        pool, table = _free_row(self.pool, self.table, row)
        return dataclasses.replace(self, pool=pool, table=table)

    def get_block_table(self, request_id: ArrayLike, layer_idx: int = 0) -> jax.Array:
        """Block ids of a row, i32[W] with padding -1.

        Args:
            request_id: row.
            layer_idx: selects the layer's group; a block spans all layers of its group.

        Raises:
            UnknownRequestError: no such row.
            InvalidArgumentError: no such layer.
        """
        layer_index(layer_idx, self.config.num_layers, "layer_idx")
        return self.table.get_row(self._checked_row(request_id))

    def usage(self) -> jax.Array:
        """Share of the pool's blocks in use, f32[], 0.0 to 1.0."""
        return 1.0 - self.pool.num_free / self.config.pool_blocks

    def get_num_free_blocks(self) -> jax.Array:
        """Blocks an admission could take, i32[]."""
        return self.pool.num_free

    def check_invariants(self) -> None:
        """Check pool and table against each other, on the host; costs O(pool).

        Raises:
            InvalidBlockError: one is broken; the message lists which.
        """
        check_invariants(self.pool, self.table)

    # -- inside ------------------------------------------------------------------------------------------------

    def _checked_row(self, request_id: ArrayLike) -> Any:
        row, rows = integer("request_id", request_id), self.config.max_num_reqs
        require((row >= 0) & (row < rows), UnknownRequestError, f"row: got {shown(row)}, want 0 to {rows - 1}")
        return row

    def _extend_row(self, row: Any, tokens: ArrayLike, allowed: ArrayLike) -> Self:
        limit = min(self.config.max_model_len, self.config.pool_blocks * self.config.block_size)
        count = integer("token count", tokens)
        require(count >= 0, InvalidArgumentError, f"token count: got {shown(count)}, want at least 0")
        fits = self.table.num_tokens[row] + count <= limit
        want = f"row {shown(row)}: got {shown(count)} more tokens, want"
        require(fits, RequestTooLongError, f"{want} at most {limit} in all")
        pool, table, ok = _extend_row(self.pool, self.table, row, jnp.where(fits & allowed, count, -1))
        require(ok, OutOfBlocksError, f"{want} what fits into {shown(self.pool.num_free)} free blocks")
        return dataclasses.replace(self, pool=pool, table=table)


@jax.jit
def _extend_row(
    pool: BlockPool, table: BlockTable, row: jax.Array, count: jax.Array
) -> tuple[BlockPool, BlockTable, jax.Array]:
    rows = jnp.where((row >= 0) & (row < table.config.max_num_reqs), row, -1)[None]
    capacity = table.config.max_num_blocks_per_req
    pool, table, ok = extend_rows(pool, table, count[None], capacity=capacity, rows=rows)
    return pool, table, ok[0]


@jax.jit
def _free_row(pool: BlockPool, table: BlockTable, row: jax.Array) -> tuple[BlockPool, BlockTable]:
    is_row = jnp.arange(table.config.max_num_reqs) == row
    pool, table, _ = free_rows(pool, table, is_row, capacity=table.config.max_num_blocks_per_req)
    return pool, table
