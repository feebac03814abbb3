"""K and V pages that lie on a mesh: ``KVPages`` whose every read and write happens on each rank by itself."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from pallas_kernels import CompressedSlotMapping
from pyagent_kv_jax.arguments import layer_index
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.kv_pages import KVPages, expanded_slots, page_shapes
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.all_reduce import all_reduce_states
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.combine import Combine, all_to_all_states, reduce_scatter_states
from pyagent_kv_jax.distributed.on_ranks import check_kv_heads, on_ranks, sinks_of_rank, static_and_arrays
from pyagent_kv_jax.errors import DeviceUnavailableError
from pyagent_kv_jax.tables import ContextParallel, local_slots


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "k_scale", "v_scale"],
    meta_fields=["config", "sharding"],
)
@dataclasses.dataclass(frozen=True)
class ShardedKVPages:
    """``KVPages`` over a mesh: the same methods with the same meaning, for use under ``jit``.

    Decode context parallel attention (DCP) as in vLLM and Helix (arXiv 2507.07120): queries are gathered over the
    context axis, each rank attends with all of them to the tokens it holds, and the shares are merged by LSE. Nothing
    else travels: pages are only read under ``shard_map``, for under plain ``jit`` XLA would gather them.

    Attributes:
        k_pages: [layers_per_group * pages_per_layer, stored heads, page_size, head_dim]. Heads are those of the model,
            or where they are fewer than tensor ranks one a rank. A page's tokens stand rank after rank, see
            ``CacheSharding.token_order``.
        v_pages: the same with the V head_dim.
        k_scale: f32[num_layers, stored heads]; None unless the dtype is quantised.
        v_scale: the same for V.
        config: static; of the whole cache, in which a block has the tokens of all ranks.
        sharding: static.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    config: KVCacheConfig
    sharding: CacheSharding

    @classmethod
    def create(cls, config: KVCacheConfig, sharding: CacheSharding) -> Self:
        """Empty pages, made where they belong.

        Raises:
            ConfigError: heads or tokens that cannot be spread like this.
            DeviceUnavailableError: the mesh is of devices of another kind than ``config.device``.
        """
        on_rank = sharding.on_rank(config)
        platform, kinds = sharding.mesh.devices.flat[0].platform, {"cuda": "gpu"}
        if platform != kinds.get(config.device_type.value, config.device_type.value):
            raise DeviceUnavailableError(f"mesh: got {platform!r} devices, want {config.device_type.value!r}")
        stored = dataclasses.replace(config, num_heads=on_rank.num_heads * sharding.tensor_size)
        shapes = page_shapes(stored)

        def empty() -> list[jax.Array]:
            return [jnp.zeros(shape, config.storage_dtype) for shape in shapes]

        def ones() -> list[jax.Array]:
            return [jnp.ones((config.num_layers, stored.num_heads), jnp.float32) for _ in shapes]

        k_pages, v_pages = jax.jit(empty, out_shardings=sharding.named(sharding.page_spec()))()
        scales: list[Any] = [None, None]
        if config.kv_dtype.is_quantized:
            scales = jax.jit(ones, out_shardings=sharding.named(_over_heads(sharding)))()
        return cls(k_pages, v_pages, scales[0], scales[1], config, sharding)

    # -- in a step -----------------------------------------------------------------------------------------------

    def attend(
        self, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, **options: Any
    ) -> tuple[jax.Array, Self]:
        """Write this step's K and V of ``layer``, then attend causally over all the rows hold.

        Arguments, result and errors as ``KVPages.attend``; ``meta`` counts the tokens of all ranks. Where the sharding
        is not theirs already, ``q`` and the result are spread over ``CacheSharding.q_head_axes``.

        Raises:
            ConfigError: query heads that the mesh's axes do not divide.
        """
        out, _, pages = self.attend_with_lse(layer, q, k, v, meta, **options)
        return out, pages

    def attend_with_lse(
        self, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, **options: Any
    ) -> tuple[jax.Array, jax.Array, Self]:
        """``attend``, and the LSE f32[T, q_heads] (natural log; -inf where a query sees nothing)."""
        check_kv_heads(self.config, k, v)
        sharding = self.sharding
        combine, heads = sharding.combine_of(q.shape[1]), P(None, sharding.q_head_axes(q.shape[1]) or None)
        sinks = options.pop("sinks", None)
        static, arrays = static_and_arrays(options)

        def attend(pages: KVPages, layer: Any, q: Any, k: Any, v: Any, meta: Any, sinks: Any, arrays: Any) -> Any:
            return _attend_on_rank(pages, layer, q, k, v, meta, sinks, sharding, combine, {**static, **arrays})

        out, lse, k_pages, v_pages = self._on_ranks(
            attend,
            (self._layer(layer), q, *self._stored_heads(k, v), meta, sinks, arrays),
            (P(), heads, _over_heads(sharding), _over_heads(sharding), P(), P(sharding.tensor_axis), P()),
            (heads, heads, sharding.page_spec(), sharding.page_spec()),
        )
        return out, lse, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def write(
        self, layer: ArrayLike, k: jax.Array, v: jax.Array, slot_mapping: jax.Array | CompressedSlotMapping
    ) -> Self:
        """Store K and V of one layer; each rank what is its own. See ``KVPages.write``."""
        check_kv_heads(self.config, k, v)
        sharding, tokens = self.sharding, k.shape[0]

        def write(pages: KVPages, layer: Any, k: Any, v: Any, slots: Any) -> Any:
            share = _share(sharding)
            if share is not None:
                slots = local_slots(expanded_slots(slots, tokens), pages.config.block_size, share)
            return _arrays(pages.write(layer, k, v, slots))

        specs = (P(), _over_heads(sharding), _over_heads(sharding), P())
        return self._with(
            self._on_ranks(
                write,
                (self._layer(layer), *self._stored_heads(k, v), slot_mapping),
                specs,
                (sharding.page_spec(),) * 2,
            )
        )

    # -- blocks --------------------------------------------------------------------------------------------------

    def copy_blocks(self, src: jax.Array, dst: jax.Array) -> Self:
        """See ``KVPages.copy_blocks``; nothing travels between ranks."""
        return self._with(
            self._on_ranks(
                lambda pages, src, dst: _arrays(pages.copy_blocks(src, dst)),
                (src, dst),
                (P(), P()),
                (self.sharding.page_spec(),) * 2,
            )
        )

    def clear_blocks(self, ids: jax.Array) -> Self:
        """See ``KVPages.clear_blocks``."""
        return self._with(
            self._on_ranks(
                lambda pages, ids: _arrays(pages.clear_blocks(ids)), (ids,), (P(),), (self.sharding.page_spec(),) * 2
            )
        )

    def gather_blocks(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V of blocks ``ids`` i32[n], each [layers_per_group, n, stored heads, block_size, head_dim], as stored.

        They stay where they are: heads and tokens are spread as in the pages, and a block's tokens stand in the order
        of ``token_order``. Zeros for id -1.
        """
        spec = self.sharding.page_spec(leading=2)
        k, v = self._on_ranks(lambda pages, ids: pages.gather_blocks(ids), (ids,), (P(),), (spec, spec))
        return k, v

    def write_blocks(self, ids: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """Put ``k`` and ``v``, as ``gather_blocks`` gives them, at blocks ``ids``; each rank its part of every block.

        See ``KVPages.write_blocks``.
        """
        part = self.sharding.page_spec(leading=2)
        return self._with(
            self._on_ranks(
                lambda pages, ids, k, v: _arrays(pages.write_blocks(ids, k, v)),
                (ids, k, v),
                (P(), part, part),
                (self.sharding.page_spec(),) * 2,
            )
        )

    def with_scales(self, k_scale: jax.Array, v_scale: jax.Array) -> Self:
        """The same pages read and written with these scales, each f32[num_layers, num_heads] or broadcastable.

        Raises:
            ShapeMismatchError: the dtype is not quantised, or the shapes do not fit.
        """
        one = KVPages(self.k_pages, self.v_pages, self.k_scale, self.v_scale, self.config)
        scaled, copies = one.with_scales(k_scale, v_scale), self.sharding.head_copies(self.config.num_heads)
        place = self.sharding.named(_over_heads(self.sharding))
        k, v = (
            jax.device_put(jnp.repeat(s, copies, axis=1), place)
            for s in (scaled.k_scale, scaled.v_scale)
            if s is not None
        )
        return dataclasses.replace(self, k_scale=k, v_scale=v)

    @property
    def nbytes(self) -> int:
        """Bytes of the page arrays on all devices of both axes together."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    # -- inside --------------------------------------------------------------------------------------------------

    def _on_ranks(self, function: Any, arguments: tuple[Any, ...], specs: tuple[Any, ...], out_specs: Any) -> Any:
        """``function(the rank's KVPages, *arguments)`` on every rank."""
        sharding, on_rank = self.sharding, self.sharding.on_rank(self.config)

        def run(pages: tuple[Any, ...], *arguments: Any) -> Any:
            k_pages, v_pages, k_scale, v_scale = pages
            return function(KVPages(k_pages, v_pages, k_scale, v_scale, on_rank), *arguments)

        page, scale = sharding.page_spec(), _over_heads(sharding)
        mapped = on_ranks(run, sharding.mesh, ((page, page, scale, scale), *specs), out_specs)
        return mapped((self.k_pages, self.v_pages, self.k_scale, self.v_scale), *arguments)

    def _with(self, arrays: tuple[jax.Array, jax.Array]) -> Self:
        return dataclasses.replace(self, k_pages=arrays[0], v_pages=arrays[1])

    def _layer(self, layer: ArrayLike) -> jax.Array:
        return jnp.asarray(layer_index(layer, self.config.num_layers), jnp.int32)

    def _stored_heads(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        copies = self.sharding.head_copies(self.config.num_heads)
        return (k, v) if copies == 1 else (jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1))


def sharded_cache(config: KVCacheConfig, sharding: CacheSharding) -> PagedKVCache:
    """An empty ``PagedKVCache`` on a mesh, for a ``jit`` and ``scan`` of one's own: pages spread, pool and table on
    every device. Errors as ``ShardedKVPages.create``."""
    cache = PagedKVCache.create(config, ShardedKVPages.create(config, sharding))
    pool, table = jax.device_put((cache.pool, cache.table), sharding.replicated)
    return dataclasses.replace(cache, pool=pool, table=table)


def _attend_on_rank(
    pages: KVPages,
    layer: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: AttentionMetadata,
    sinks: jax.Array | None,
    sharding: CacheSharding,
    combine: Combine,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(out, LSE, K pages, V pages) of one rank; ``q`` are its own heads, and so is ``out``."""
    axis, share = sharding.context_axis, _share(sharding)
    if axis is None or share is None:
        out, lse, pages = pages.attend_share(layer, q, k, v, meta, sinks=sinks, **options)
        return out, lse, *_arrays(pages)
    if combine is not Combine.ALL_REDUCE:
        q = lax.all_gather(q, axis, axis=1, tiled=True)
    sinks = sinks_of_rank(sinks, share.rank)
    out, lse, pages = pages.attend_share(layer, q, k, v, meta, sinks=sinks, context_parallel=share, **options)
    if combine is Combine.ALL_REDUCE:
        out, lse = all_reduce_states(out, lse, axis, share.size, sharding.strategy)
    elif combine is Combine.ALL_TO_ALL:
        out, lse = all_to_all_states(out, lse, axis)
    else:
        out, lse = reduce_scatter_states(out, lse, axis)
    return out, lse, *_arrays(pages)


def _share(sharding: CacheSharding) -> ContextParallel | None:
    """The share of the tokens that this rank holds, within ``shard_map``; None: all."""
    if sharding.context_axis is None or sharding.context_size == 1:
        return None
    return ContextParallel(sharding.context_size, lax.axis_index(sharding.context_axis), sharding.interleave)


def _arrays(pages: KVPages) -> tuple[jax.Array, jax.Array]:
    return pages.k_pages, pages.v_pages


def _over_heads(sharding: CacheSharding) -> Any:
    """Of K and V of tokens [T, heads, head_dim], and of scales [layers, heads]."""
    return P(None, sharding.tensor_axis)
