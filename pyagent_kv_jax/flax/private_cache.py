"""The cache that one attention module keeps for itself: making it, checking it, and attending through it.

The NNX and the Linen module differ in where they keep it, not in what they do with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integers
from pyagent_kv_jax.cache.kv_pages import KVPages, page_shapes
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.config import DType, KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages, sharded_cache
from pyagent_kv_jax.errors import (
    ConfigError,
    InvalidArgumentError,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    is_concrete,
)
from pyagent_kv_jax.flax.padded_rows import PaddedRows

Rope = Callable[[jax.Array, jax.Array], jax.Array]
"""``rope(x [batch, n, heads, head_dim], positions i32[batch, n])``."""

_CONFIG_OPTIONS = ("block_size", "num_blocks", "dtype", "kernel_block_size", "device", "memory_fraction")
_SCALES = ("k_scale", "v_scale")


class CacheOwner(NamedTuple):
    """The module that a cache belongs to, as errors speak of it.

    Attributes:
        name: class, and place in the model where that is known.
        remedy: what makes a cache that fits.
        num_kv_heads: of the module.
        head_dim: of the module.
    """

    name: str
    remedy: str
    num_kv_heads: int
    head_dim: int


def static_options(options: Mapping[str, Any] | None) -> FrozenDict[str, Any]:
    """``cache_options`` as a module keeps them: hashable, for ``jit`` with the module as a static argument.

    Scales of several heads become tuples.
    """
    return FrozenDict({name: _static(value) for name, value in (options or {}).items()})


def create_private_cache(
    owner: CacheOwner,
    rows: int,
    most_tokens: int,
    dtype: Any,
    options: Mapping[str, Any],
    sharding: CacheSharding | None,
) -> PagedKVCache:
    """An empty cache of one layer.

    Args:
        owner: whose.
        rows: requests it holds at once.
        most_tokens: of the longest.
        dtype: of the pages, where ``options`` name none.
        options: of ``KVCacheConfig`` ``block_size`` (16), ``num_blocks`` (as many as all rows can fill) or
            ``memory_fraction``, ``dtype`` (also as JAX has it), ``kernel_block_size``, ``device``; ``k_scale`` and
            ``v_scale`` (1) of quantised pages, of ``KVPages.with_scales``.
        sharding: where on a mesh. None: on one device.

    Raises:
        ConfigError: an unknown option, or as ``KVCacheConfig`` and ``CacheSharding``.
        ShapeMismatchError: scales for pages that are not quantised, or that do not fit.
    """
    unknown = sorted(set(options) - {*_CONFIG_OPTIONS, *_SCALES})
    if unknown:
        raise ConfigError(
            f"cache_options: got {', '.join(unknown)}, want some of {', '.join(_CONFIG_OPTIONS + _SCALES)}"
        )
    fields: dict[str, Any] = {"block_size": 16}
    fields |= {name: value for name, value in options.items() if name in _CONFIG_OPTIONS}
    fields["dtype"] = DType(fields.get("dtype") or dtype)
    sized = "num_blocks" in fields or "memory_fraction" in fields
    if not sized and isinstance(fields["block_size"], int) and fields["block_size"] > 0:
        fields["num_blocks"] = rows * math.ceil(most_tokens / fields["block_size"])
    config = KVCacheConfig(
        num_layers=1,
        num_heads=owner.num_kv_heads,
        head_dim=owner.head_dim,
        max_num_reqs=rows,
        max_model_len=most_tokens,
        **fields,
    )
    if sharding is not None:
        _check_axis_types(owner)
    cache = PagedKVCache.create(config) if sharding is None else sharded_cache(config, sharding)
    if any(name in options for name in _SCALES):
        pages = cache.pages.with_scales(*(options.get(name, 1.0) for name in _SCALES))
        cache = dataclasses.replace(cache, pages=pages)
    return cache


def cache_shape(cache: PagedKVCache) -> str:
    """What fits into it, for a message."""
    config = cache.config
    return (
        f"{config.max_num_reqs} rows x {config.max_model_len} tokens x {config.num_heads} kv heads x head_dim "
        f"{config.head_dim}, in blocks of {config.block_size}"
    )


def check_cache(owner: CacheOwner, cache: Any) -> PagedKVCache:
    """``cache``, if it is one for its owner.

    Raises:
        InvalidArgumentError: something else, or a cache whose every array is 0.
        ShapeMismatchError: of another geometry: made for another module, or restored from a checkpoint of another.
        ConfigError: over a mesh, where one with Explicit axes is set.
    """
    if not isinstance(cache, PagedKVCache):
        kind = type(cache).__name__
        raise InvalidArgumentError(f"{owner.name}: got a cache of type {kind}, want a PagedKVCache; {owner.remedy}")
    config, pages = cache.config, cache.pages
    fits = (config.num_layers, config.num_heads, config.head_dim, config.value_head_dim) == (
        1,
        owner.num_kv_heads,
        owner.head_dim,
        owner.head_dim,
    )
    # Arrays may have been restored into a cache of another config.
    table, rows = cache.table, config.max_num_reqs
    fits = fits and table.blocks.shape == (rows, config.table_config().max_num_blocks_per_req)
    fits = fits and table.num_tokens.shape == (rows,) and cache.pool.ref_counts.shape == (config.pool_blocks,)
    if isinstance(pages, KVPages):
        fits = fits and (pages.k_pages.shape, pages.v_pages.shape) == page_shapes(config)
    if not fits:
        raise ShapeMismatchError(
            f"{owner.name}: got a cache of {cache_shape(cache)}, pages {list(pages.k_pages.shape)}, table "
            f"{list(table.blocks.shape)}, pool {list(cache.pool.ref_counts.shape)}, want one layer of "
            f"{owner.num_kv_heads} kv heads x head_dim {owner.head_dim}; {owner.remedy}"
        )
    if isinstance(pages, ShardedKVPages):
        _check_axis_types(owner)
    # In numpy: a cache that has values may be a constant in a trace, where jax.numpy would give none.
    pool = (cache.pool.counters, cache.pool.ref_counts)
    if is_concrete(pool) and not any(np.asarray(array).any() for array in pool):
        raise InvalidArgumentError(
            f"{owner.name}: got a cache of {cache_shape(cache)} whose pool is all zeros, want one that was made, not "
            f"mapped to zeros; {owner.remedy}"
        )
    return cache


def checked_counts(
    owner: CacheOwner, cache: PagedKVCache, inputs: tuple[jax.Array, ...], lengths: ArrayLike | None
) -> jax.Array:
    """i32[rows]: the tokens that each row brings.

    Args:
        owner: of the cache.
        cache: checked.
        inputs: of the call, each [..., n, features], the leading axes in all as many as the cache has rows.
        lengths: i32[rows], or shaped like the leading axes. None: n each.

    Raises:
        ShapeMismatchError: inputs or lengths of other rows.
        InvalidArgumentError: (outside ``jit``) lengths that are not 0 to n.
        RequestTooLongError: (outside ``jit``) a row that outgrows the cache.
    """
    rows, lead = cache.config.max_num_reqs, inputs[0].shape[:-1]
    if not lead or math.prod(lead[:-1]) != rows or lead[-1] < 1 or any(x.shape[:-1] != lead for x in inputs):
        raise ShapeMismatchError(
            f"{owner.name}: got inputs of shapes {[list(x.shape) for x in inputs]}, want [{rows}, n, features] each, "
            f"for its cache of {cache_shape(cache)}; {owner.remedy}"
        )
    n = lead[-1]
    if lengths is None:
        counts = jnp.full(rows, n, jnp.int32)
    else:
        flat = np.shape(lengths) == lead[:-1] and len(lead) != 2
        counts = integers("lengths", jnp.ravel(jnp.asarray(lengths)) if flat else lengths, rows)
    held = cache.table.num_tokens
    if is_concrete(counts, held):
        _check_counts(owner, cache, np.asarray(counts), np.asarray(held), n)
    return jnp.asarray(counts)


def attend_padded(
    owner: CacheOwner,
    cache: PagedKVCache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    counts: jax.Array,
    *,
    rope: Rope | None,
    sliding_window: int | None,
) -> tuple[jax.Array, PagedKVCache]:
    """Take each row's tokens into the cache, and attend with them to all that the row holds.

    Args:
        owner: of the cache.
        cache: of R rows.
        q: [..., n, heads, head_dim]; the leading axes are R rows in all.
        k: [..., n, kv_heads, head_dim].
        v: likewise.
        counts: i32[R], how many of the n tokens of each row are real, the first ones.
        rope: turns q and k by where they stand.
        sliding_window: tokens a query sees, itself included. None: all.

    Returns:
        (out of q's shape, cache). 0 for padding; under ``jit`` a row that was refused (no blocks left, more tokens
        than the cache is for, a count that is not 0 to n) is NaN, and keeps what it had.

    Raises:
        OutOfBlocksError: (outside ``jit``) a row for which there are no blocks left.
    """
    shape, (n, *_), rows = q.shape, q.shape[-3:], cache.config.max_num_reqs
    q, k, v = (x.reshape(rows, n, *x.shape[-2:]) for x in (q, k, v))
    held = cache.table.num_tokens
    if rope is not None:
        positions = held[:, None] + jnp.arange(n, dtype=jnp.int32)
        q, k = rope(q, positions), rope(k, positions)
    before = cache
    cache, meta = cache.extend(jnp.where(counts <= n, counts, -1), num_tokens=None if n == 1 else rows * n)
    if is_concrete(meta.ok, counts, held) and not np.all(meta.ok):
        row, free = int(np.argmin(meta.ok)), int(before.get_num_free_blocks())
        raise OutOfBlocksError(
            f"{owner.name}: row {row}: got {counts[row]} tokens after {held[row]}, want what fits into {free} free "
            f"blocks of its cache of {cache_shape(before)}; cache_options' num_blocks makes it larger"
        )
    tokens = PaddedRows.of(meta.query_start_loc, rows, n)
    q, k, v = (tokens.ragged(x) for x in (q, k, v))
    out, cache = cache.attend(0, q, k, v, meta, sliding_window=sliding_window)
    out = jnp.where(meta.ok[:, None, None, None], tokens.padded(out), jnp.nan)
    return out.reshape(shape), cache


def turned(rope: Rope, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """``rope`` of Q or K, whose leading axes it is shown as one.

    Args:
        rope: turns [batch, n, heads, head_dim].
        x: [..., n, heads, head_dim].
        positions: i32[..., n]. None: 0, 1, ..., as without a cache.
    """
    *lead, n, heads, head_dim = x.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*lead, n))
    batch = math.prod(lead)
    return rope(x.reshape(batch, n, heads, head_dim), positions.reshape(batch, n)).reshape(x.shape)


def _static(value: Any) -> Any:
    def as_tuples(value: Any) -> Any:
        return tuple(map(as_tuples, value)) if isinstance(value, list) else value

    return as_tuples(np.asarray(value).tolist()) if isinstance(value, (list, np.ndarray, jax.Array)) else value


def _check_axis_types(owner: CacheOwner) -> None:
    """That no mesh with Explicit axes is set: the types of its arrays do not go with those of pages over a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in (mesh.axis_types or ()):
        raise ConfigError(
            f"{owner.name}: got a mesh with axes of types {mesh.axis_types}, want jax.make_mesh(..., "
            f"axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}) for a model whose cache lies on a mesh"
        )


def _check_counts(owner: CacheOwner, cache: PagedKVCache, given: np.ndarray, held: np.ndarray, n: int) -> None:
    if ((given < 0) | (given > n)).any():
        raise InvalidArgumentError(
            f"{owner.name}: lengths: got {given.tolist()}, want 0 to {n} each, the tokens of a row"
        )
    most, row = cache.config.max_model_len, int(np.argmax(held + given))
    if held[row] + given[row] > most:
        raise RequestTooLongError(
            f"{owner.name}: row {row} would hold {held[row] + given[row]} tokens, want at most {most}, for its cache "
            f"of {cache_shape(cache)}; {owner.remedy}"
        )
