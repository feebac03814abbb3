"""What the TPU attention kernel is given, by kind of memory, and what is known when it is built."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.paged_attention.work_items import Item

# Pieces of the table at a time: of the step that is computed (its mask asks), of the next, whose pages are on their
# way, and of the one after, on its own way. A power of two, for arithmetic.
TABLE_BUFFERS = 4


class Scalars(NamedTuple):
    """Everything in scalar memory.

    Attributes:
        num_items: i32[1].
        items: fields i32[most items].
        columns: (first, one past the last) column that some query of the item needs, i32[most items] each.
        sliding_window, chunk_size: None or i32[1].
        rank: i32[1], of the context-parallel ranks.
        logits_scale: f32[kv_heads], all scales of K and the logits.
        v_scale: f32[kv_heads].
        logits_soft_cap: None or f32[1].
    """

    num_items: Any
    items: Item
    columns: tuple[Any, Any]
    sliding_window: Any
    chunk_size: Any
    rank: Any
    logits_scale: Any
    v_scale: Any
    logits_soft_cap: Any


class Arrays(NamedTuple):
    """In HBM, but for ``sinks`` in VMEM.

    Attributes:
        q: [tokens, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, block_size, D].
        blocks: i32[seqs, width], page ids; what is no id of a page: none. Whole tiles, see ``Plan.whole_pieces``.
        positions: None, or i32[seqs, width], of each column's first token, -1: unused.
        sinks: None or f32[kv_heads, rows, 1].
    """

    q: Any
    k_pages: Any
    v_pages: Any
    blocks: Any
    positions: Any
    sinks: Any


class Outputs(NamedTuple):
    """In HBM out [tokens, q_heads, v_head_dim]; lse None or f32[tokens, q_heads, 128], the same in every lane."""

    out: Any
    lse: Any


class Semaphores(NamedTuple):
    """One for each buffer: of q (2), of pages (2), of results (1), of pieces of the table (TABLE_BUFFERS)."""

    q: Any
    pages: Any
    results: Any
    tables: Any


class Scratch(NamedTuple):
    """In VMEM, but for ``blocks``, ``positions`` and ``fetched`` in scalar memory; every first dimension of 2 is a
    double buffer.

    Attributes:
        q: [2, tile, q_heads, head_dim], as in HBM.
        rows: [kv_heads, rows, head_dim], what the products take.
        k, v: [2, step, kv_heads, block_size, D].
        highest, total: f32[kv_heads, rows, 1], of the online softmax.
        values: f32[kv_heads, rows, v_head_dim], the same.
        results: ``Outputs`` of one tile.
        keys_across, keys_down: i32[1, keys] and i32[step, block_size, 1], positions of a step's keys.
        blocks, positions: i32[TABLE_BUFFERS, piece], pieces of the tables; positions may be None.
        fetched: i32[2], how many pages of a step are on their way.
        semaphores: of every transfer.
    """

    q: Any
    rows: Any
    k: Any
    v: Any
    highest: Any
    total: Any
    values: Any
    results: Outputs
    keys_across: Any
    keys_down: Any
    blocks: Any
    positions: Any
    fetched: Any
    semaphores: Semaphores


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernel is built.

    Attributes:
        kv_heads, group: query heads are their product.
        head_dim, v_head_dim: logical.
        block_size: tokens in a page.
        tile: queries of an item.
        step: pages read at a time.
        compute: dtype of the products' operands, float32 or bfloat16.
        kv_dtype: logical dtype of the pages.
        causal: whether queries see no later key.
        context_size, interleave: of context parallelism.
    """

    kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    block_size: int
    tile: int
    step: int
    compute: Any
    kv_dtype: Any
    causal: bool
    context_size: int
    interleave: int

    @property
    def rows(self) -> int:
        """Rows of a KV head, filled up to whole tiles of memory."""
        whole = 32 // jnp.dtype(self.compute).itemsize
        return -(-self.tile * self.group // whole) * whole

    @property
    def keys(self) -> int:
        """Keys of a step."""
        return self.step * self.block_size

    @property
    def piece(self) -> int:
        """Columns of a piece of the block table: whole tiles, and a step in them wherever it starts."""
        return -(-(self.step + LANES - 1) // LANES) * LANES

    def whole_pieces(self, table: jax.Array) -> jax.Array:
        """A table filled up with -1, where it must be, so that all its pieces are inside it."""
        width = table.shape[1]
        return jnp.pad(table, ((0, 0), (0, max(-width % LANES, self.piece - width))), constant_values=-1)
