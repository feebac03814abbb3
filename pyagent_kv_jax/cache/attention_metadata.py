"""What one step of a model needs to know about the cache, and what a cache must offer a model."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol, Self

import jax

from pallas_kernels import CompressedSlotMapping
from pyagent_kv_jax.cache.cache_display import metadata_line


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_tables", "kv_lens", "query_start_loc", "slot_mapping", "positions", "ok"],
    meta_fields=["max_query_len", "max_kv_len"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class AttentionMetadata:
    """Where a step's tokens stand, for a batch of R rows and T tokens. Made once a step, read by every layer.

    A cache of several layer groups has a leading axis of G groups on ``block_tables`` and ``slot_mapping``.

    Attributes:
        block_tables: i32[R, W], padding -1. Block ids within a layer, not yet page ids.
        kv_lens: i32[R], tokens of each row after this step; 0 for rows that take no part.
        query_start_loc: i32[R + 1], where each row's tokens start among the T; None: token r belongs to row r.
        slot_mapping: i32[T], where each token's K and V go; -1: nowhere. Or the same as a
            ``CompressedSlotMapping``.
        positions: i32[T], position of each token in its sequence; 0 for padding.
        ok: bool[R], whether the row was served; a refused row's tokens are neither written nor attended.
        max_query_len: static; no row brings more tokens than this. None: no bound known.
        max_kv_len: static; no row is longer than this. None: no bound known.
    """

    block_tables: jax.Array
    kv_lens: jax.Array
    query_start_loc: jax.Array | None
    slot_mapping: Any
    positions: jax.Array
    ok: jax.Array
    max_query_len: int | None = None
    max_kv_len: int | None = None

    def __repr__(self) -> str:
        return metadata_line(self)

    def cut(self, num_rows: int, num_tokens: int) -> Self:
        """The first rows and tokens of a step that was padded to more."""
        decode, slots = self.query_start_loc is None, self.slot_mapping
        return dataclasses.replace(
            self,
            block_tables=self.block_tables[..., :num_rows, :],
            kv_lens=self.kv_lens[:num_rows],
            query_start_loc=None if self.query_start_loc is None else self.query_start_loc[: num_rows + 1],
            slot_mapping=slots if isinstance(slots, CompressedSlotMapping) else slots[..., :num_tokens],
            positions=self.positions[:num_tokens],
            ok=self.ok[:num_rows],
            max_query_len=1 if decode else num_tokens,
        )


class LayerCache(Protocol):
    """What a model needs of its cache: a pytree that each layer writes to and attends through."""

    def attend(
        self,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: AttentionMetadata,
        *,
        scale: float | None = None,
        sliding_window: Any = None,
        chunk_size: Any = None,
        logits_soft_cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, Self]:
        """Store ``k``, ``v`` [T, kv_heads, head_dim] of ``layer`` (traced i32[]), then attend with ``q``
        [T, q_heads, head_dim], causally, over everything stored. Returns ([T, q_heads, v_head_dim], new cache)."""
        ...
