"""Blocks out of the pages of one side and into those of another: read, put where they belong, written in place.

Within one process that is all there is to a handoff between two meshes: ``move_blocks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.handoff.block_layout import BlockLayout, Blocks, Pages, sharding_of_blocks
from pyagent_kv_jax.errors import InvalidBlockError, ShapeMismatchError
from pyagent_kv_jax.tables.padding import chunks

CHUNK_BYTES = 16 << 20
"""K and V that travel together: large enough that a round trip is nothing beside it, small enough to overlap."""


def read_blocks(pages: Pages, ids: Sequence[int] | np.ndarray) -> Blocks:
    """Canonical copies of blocks ``ids`` i32[n], on the devices of ``pages``. Dispatched, not waited for.

    Raises:
        InvalidBlockError: an id that is no block of the pool.
    """
    return _read(pages, checked_ids(pages.config, ids))


def write_blocks(pages: Any, ids: Sequence[int] | np.ndarray, blocks: Blocks) -> Any:
    """``pages``, donated, with canonical ``blocks`` at ``ids`` i32[n], none twice; wherever the blocks are now.

    Raises:
        InvalidBlockError: an id that is no block of the pool, or named twice; nothing has changed.
        ShapeMismatchError: blocks of another geometry; nothing has changed.
    """
    chosen = checked_ids(pages.config, ids)
    if len(np.unique(chosen)) != len(chosen):
        raise InvalidBlockError(f"ids: got {chosen.tolist()}, want no block twice")
    layout = BlockLayout.of(pages)
    k_shape, v_shape, dtype = layout.canonical_shapes(len(chosen))
    for name, x, shape in (("k", blocks.k, k_shape), ("v", blocks.v, v_shape)):
        if x.shape != shape or x.dtype != dtype:
            raise ShapeMismatchError(f"{name}: got {x.dtype}{list(x.shape)}, want {dtype}{list(shape)}")
    if not layout.is_canonical_as_stored():
        blocks = _as_stored(blocks, layout)  # before they cross over, so that each device gets only what it keeps
    return _write(pages, chosen, jax.device_put(blocks, sharding_of_blocks(pages)))


def move_blocks(
    source: Pages,
    source_ids: Sequence[int] | np.ndarray,
    target: Any,
    target_ids: Sequence[int] | np.ndarray,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Any:
    """Copy blocks between the pages of two meshes or devices of this process, bit for bit.

    The two may spread heads and tokens differently. Quantisation scales do not move: they must be equal.

    Args:
        source: pages of any kind.
        source_ids: i32[n].
        target: pages of any kind, of the same geometry; donated.
        target_ids: i32[n], none twice.
        chunk_bytes: blocks of about so many bytes are under way at a time.

    Returns:
        ``target`` with the blocks.

    Raises:
        InvalidBlockError: ids outside a pool, or a target named twice; nothing has moved.
        ShapeMismatchError: another number of targets than of sources, or blocks of another geometry.
    """
    reading, writing = checked_ids(source.config, source_ids), checked_ids(target.config, target_ids)
    if len(reading) != len(writing) or len(np.unique(writing)) != len(writing):
        raise InvalidBlockError(f"target_ids: got {writing.tolist()}, want {len(reading)} blocks, none twice")
    if (ours := block_geometry(source.config)) != (theirs := block_geometry(target.config)):
        raise ShapeMismatchError(f"blocks: got {ours} of the source, want {theirs} of the target")
    for chunk in chunks(len(reading), blocks_of_bytes(source.config, chunk_bytes)):
        target = write_blocks(target, writing[chunk], read_blocks(source, reading[chunk]))
    return target


def block_geometry(config: KVCacheConfig) -> dict[str, Any]:
    """What two caches must have in common to hold the same blocks."""
    return {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.value_head_dim,
        "block_size": config.block_size,
        "dtype": config.kv_dtype.value,
        "layer_groups": [[list(g.layers), g.sliding_window, g.chunk_size] for g in config.groups],
    }


def blocks_of_bytes(config: KVCacheConfig, num_bytes: int) -> int:
    """The largest power of two of blocks of at most so many bytes; at least 1."""
    return 1 << max(num_bytes // config.block_size_bytes(), 1).bit_length() - 1


def checked_ids(config: KVCacheConfig, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """``ids`` as i32[n].

    Raises:
        InvalidBlockError: one that is no block of the pool.
        ShapeMismatchError: not a list of integers.
    """
    given = np.asarray(ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ShapeMismatchError(f"ids: got {given.dtype}{list(given.shape)}, want int32[n]")
    outside = given[(given < 0) | (given >= config.pool_blocks)]
    if outside.size:
        raise InvalidBlockError(f"ids: got {outside[:20].tolist()}, want 0 to {config.pool_blocks - 1}")
    return given.astype(np.int32)


@jax.jit
def _read(pages: Pages, ids: jax.Array) -> Blocks:
    return BlockLayout.of(pages).canonical(Blocks(*pages.gather_blocks(ids)))


@partial(jax.jit, static_argnames="layout")
def _as_stored(blocks: Blocks, layout: BlockLayout) -> Blocks:
    return layout.stored(blocks)


@partial(jax.jit, donate_argnums=0)
def _write(pages: Any, ids: jax.Array, blocks: Blocks) -> Any:
    return pages.write_blocks(ids, blocks.k, blocks.v)
