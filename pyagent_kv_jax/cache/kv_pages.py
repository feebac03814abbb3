"""The K and V pages themselves: the big arrays that live on the accelerator and are only ever donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import CompressedSlotMapping, paged_attention, paged_copy, paged_gather, paged_write
from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range
from pyagent_kv_jax.arguments import layer_index
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.errors import ConfigError, ShapeMismatchError
from pyagent_kv_jax.tables import ContextParallel, local_slots


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "k_scale", "v_scale"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """K and V of every layer, in flat pages.

    Page ``p`` of layer ``l`` is page ``l * pages_per_layer + p`` of all: no kernel is ever handed a slice of a layer,
    which XLA would copy. Inside a scan over layers the pages are the carry. With several layer groups, a block belongs
    to one group at a time, and ``l`` is the layer's place in its group.

    Block ``b`` is the pages ``b * k`` to ``b * k + k - 1`` of each layer it spans (hybrid block sizes; else k is 1).
    Slots are the same numbers in blocks and in pages, so only block ids are translated, and only here.

    Attributes:
        k_pages: [layers_per_group * pages_per_layer, num_heads, page_size, head_dim], of ``config.storage_dtype``.
        v_pages: the same with the V head_dim.
        k_scale: f32[num_layers, num_heads], stored K times this is K; None unless the dtype is quantised.
        v_scale: the same for V.
        config: static.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    config: KVCacheConfig

    @classmethod
    def create(cls, config: KVCacheConfig, sharding: jax.sharding.Sharding | None = None) -> Self:
        """Empty pages on ``config.device``, or where ``sharding`` says: one device, or the same on several.

        Raises:
            ConfigError: ``sharding`` spreads them. Under plain ``jit`` XLA would gather them for every step;
                ``distributed.ShardedKVPages`` are read on each device by itself.
            DeviceUnavailableError: this process has no such device.
        """
        if sharding is not None and not sharding.is_fully_replicated:
            raise ConfigError(f"sharding: got {sharding}, want one device; for several: distributed.ShardedKVPages")
        if sharding is None and config.device_type is not DeviceType.default():
            sharding = jax.sharding.SingleDeviceSharding(config.device_type.devices()[0])
        k_shape, v_shape = page_shapes(config)
        ones = jnp.ones((config.num_layers, config.num_heads), jnp.float32) if config.kv_dtype.is_quantized else None
        return cls(
            k_pages=jnp.zeros(k_shape, config.storage_dtype, device=sharding),
            v_pages=jnp.zeros(v_shape, config.storage_dtype, device=sharding),
            k_scale=ones,
            v_scale=ones if ones is None else ones.copy(),  # two buffers: one cannot be donated twice
            config=config,
        )

    def write(
        self, layer: ArrayLike, k: jax.Array, v: jax.Array, slot_mapping: jax.Array | CompressedSlotMapping
    ) -> Self:
        """Store ``k`` [T, num_heads, head_dim] and ``v`` [T, num_heads, v_head_dim] of ``layer`` at the slots.

        Args:
            layer: i32[], may be traced.
            k: any float dtype; quantised or cast to the pages' dtype on the way in.
            v: likewise.
            slot_mapping: i32[T], slots within a layer, or the same compressed; -1 is dropped. One outside the pool is a
                ``checkify`` error; outside checking mode it is dropped too.

        Raises:
            ShapeMismatchError: heads, head_dim or T do not fit.
        """
        slots = expanded_slots(slot_mapping, k.shape[0])
        self._check_tokens(k, v, slots)
        config = self.config
        layer = layer_index(layer, config.num_layers)
        first = self._span_index(layer) * (config.pages_per_layer * config.page_size)
        slots = _within(slots, config.pool_blocks * config.block_size, first, "slot_mapping")
        k_pages, v_pages = paged_write(
            self.k_pages,
            self.v_pages,
            k,
            v,
            slots,
            k_scale=_of_layer(self.k_scale, layer),
            v_scale=_of_layer(self.v_scale, layer),
            kv_dtype=config.kv_dtype.jax_dtype,
            implementation=self._implementation,
        )
        return dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def attend(
        self,
        layer: ArrayLike,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: AttentionMetadata,
        *,
        scale: float | None = None,
        sliding_window: ArrayLike | None = None,
        chunk_size: ArrayLike | None = None,
        logits_soft_cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, Self]:
        """Write this step's K and V of ``layer``, then attend causally over all the rows hold.

        Args:
            layer: i32[], may be traced.
            q: [T, q_heads, head_dim].
            k: [T, num_heads, head_dim].
            v: [T, num_heads, v_head_dim].
            meta: of this step.
            scale: of the logits; None: ``head_dim ** -0.5``.
            sliding_window: i32[], may be traced: a query sees this many tokens, itself included. None: all.
            chunk_size: i32[], may be traced: a query sees its own chunk of so many tokens (Llama 4). None: all.
            logits_soft_cap: ``cap * tanh(logits / cap)``. None: no cap.
            sinks: f32[q_heads], one logit a head that takes weight and gives nothing.

        Returns:
            ([T, q_heads, v_head_dim] of q's dtype, the new pages).

        Raises:
            ShapeMismatchError: shapes do not fit the cache.
        """
        out, _, pages = self.attend_share(
            layer,
            q,
            k,
            v,
            meta,
            scale=scale,
            sliding_window=sliding_window,
            chunk_size=chunk_size,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
        )
        return out, pages

    def attend_share(
        self,
        layer: ArrayLike,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: AttentionMetadata,
        *,
        context_parallel: ContextParallel | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, Self]:
        """``attend`` where these pages hold one rank's share of every sequence's tokens.

        Args:
            layer, q, k, v: as for ``attend``; ``k`` and ``v`` of all the step's tokens, of which only the rank's own
                are written.
            meta: the same on every rank: lengths and positions count all ranks' tokens, a block has ``block_size`` of
                them on each rank, and ``slot_mapping`` names slots of such whole blocks.
            context_parallel: which share. None: all tokens.
            **options: as for ``attend``; ``sinks`` are counted on every rank that is given them.

        Returns:
            (out [T, q_heads, v_head_dim] of q's dtype, lse f32[T, q_heads], the new pages): the rank's partial
            attention, 0 and -inf for queries that see nothing here.
        """
        config, layer = self.config, layer_index(layer, self.config.num_layers)
        if q.ndim != 3 or q.shape[-1] != config.head_dim or q.shape[1] % config.num_heads:
            raise ShapeMismatchError(
                f"q: got shape {q.shape}, want [tokens, a multiple of {config.num_heads} heads, {config.head_dim}]"
            )
        tables, slot_mapping = meta.block_tables, meta.slot_mapping
        if len(config.groups) > 1:
            group = _per_layer(config, lambda group, _: group)[layer]
            tables, slot_mapping = jax.tree.map(lambda groups: groups[group], (tables, slot_mapping))
        if context_parallel is not None:
            slot_mapping = local_slots(expanded_slots(slot_mapping, k.shape[0]), config.block_size, context_parallel)
        pages = self.write(layer, k, v, slot_mapping)
        out, lse = paged_attention(
            q,
            pages.k_pages,
            pages.v_pages,
            self._pages(tables, self._span_index(layer) * config.pages_per_layer, "block_tables"),
            meta.kv_lens,
            meta.query_start_loc,
            k_scale=_of_layer(self.k_scale, layer),
            v_scale=_of_layer(self.v_scale, layer),
            kv_dtype=config.kv_dtype.jax_dtype,
            v_head_dim=config.value_head_dim,
            return_lse=True,
            max_query_len=meta.max_query_len,
            max_kv_len=meta.max_kv_len,
            context_parallel=context_parallel,
            implementation=self._implementation,
            **options,
        )
        return out, lse, pages

    def copy_blocks(self, src: jax.Array, dst: jax.Array) -> Self:
        """Copy blocks ``src`` i32[n] to ``dst`` i32[n] in every layer, as if all reads came before all writes.

        Pairs with a -1 are left out. Ids outside the pool: see ``pages_of``.
        """
        src_pages, dst_pages = self.pages_of(src), self.pages_of(dst)
        k_pages, v_pages = paged_copy(
            (self.k_pages, self.v_pages), src_pages.ravel(), dst_pages.ravel(), implementation=self._implementation
        )
        return dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def clear_blocks(self, ids: jax.Array) -> Self:
        """Zeros in every layer of blocks ``ids`` i32[n]; -1 is padding. In place where the ``jit`` around donates.

        So that a block changes hands with nothing of its last holder in it. Ids outside the pool: see ``pages_of``.
        """
        pages = nowhere_if_invalid(self.pages_of(ids).ravel(), self.k_pages.shape[0])
        k_pages, v_pages = (stored.at[pages].set(0, mode="drop") for stored in (self.k_pages, self.v_pages))
        return dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def gather_blocks(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V of blocks ``ids`` i32[n] over the layers they span.

        Each [layers_per_group, n, num_heads, block_size, head_dim], as stored (raw bits for fp8); zeros for id -1.
        Ids outside the pool: see ``pages_of``.
        """
        pages = self.pages_of(ids).ravel()
        k, v = (
            self._as_blocks(paged_gather(stored, pages, implementation=self._implementation))
            for stored in (self.k_pages, self.v_pages)
        )
        return k, v

    def write_blocks(self, ids: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """Store whole blocks as ``gather_blocks`` gives them, in place where the ``jit`` around donates the pages.

        Args:
            ids: i32[n], none twice; -1 is left out. Ids outside the pool: see ``pages_of``.
            k: [layers_per_group, n, num_heads, block_size, head_dim], of the pages' dtype, or unsigned integers of its
                bits, and of the stored head_dim.
            v: likewise.

        Raises:
            ShapeMismatchError: other shapes or dtypes.
        """
        pages, arrays = self.pages_of(ids).ravel(), []
        for name, blocks, stored in (("k", k, self.k_pages), ("v", v, self.v_pages)):
            config, (_, heads, _, dim) = self.config, stored.shape
            want = (config.layers_per_group, *jnp.shape(ids), heads, config.block_size, dim)
            bits = jnp.dtype(f"uint{stored.dtype.itemsize * 8}")
            if blocks.shape != want or blocks.dtype not in (stored.dtype, bits):
                raise ShapeMismatchError(
                    f"{name}: got {blocks.dtype}{list(blocks.shape)}, want {stored.dtype}{list(want)}"
                )
            arrays.append(_with_pages(stored, pages, self._as_pages(blocks), loop=self._implementation == "xla"))
        return dataclasses.replace(self, k_pages=arrays[0], v_pages=arrays[1])

    def pages_of(self, ids: jax.Array) -> jax.Array:
        """Page ids i32[layers_per_group, n * k] of blocks ``ids`` i32[n]; for -1, k times -1.

        An id outside the pool is a ``checkify`` error; outside checking mode it is taken for -1.
        """
        layers = jnp.arange(self.config.layers_per_group, dtype=jnp.int32)[:, None]
        return self._pages(ids, layers * self.config.pages_per_layer, "ids")

    def with_scales(self, k_scale: jax.Array, v_scale: jax.Array) -> Self:
        """The same pages read and written with these scales, each f32[num_layers, num_heads] or broadcastable.

        Raises:
            ShapeMismatchError: the dtype is not quantised, or the shapes do not fit.
        """
        config = self.config
        shape = (config.num_layers, config.num_heads)
        if not config.kv_dtype.is_quantized:
            raise ShapeMismatchError(f"scales: got some for dtype {config.kv_dtype.value}, want int8 or fp8 pages")
        try:
            k_scale, v_scale = (jnp.broadcast_to(jnp.asarray(s, jnp.float32), shape) for s in (k_scale, v_scale))
        except ValueError as error:
            got = (jnp.shape(k_scale), jnp.shape(v_scale))
            raise ShapeMismatchError(f"scales: got shapes {got}, want broadcastable to {shape}") from error
        return dataclasses.replace(self, k_scale=k_scale, v_scale=v_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the page arrays."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    @property
    def _implementation(self) -> str | None:
        # Under jit, where pages are is not known, and a process with a GPU may keep some pages on the host.
        return "xla" if self.config.device_type is DeviceType.CPU else None

    def _pages(self, blocks: jax.Array, first: jax.Array, name: str) -> jax.Array:
        """Page ids i32[..., n * k] of ``blocks`` i32[..., n] in layers that begin at page ``first``; else -1."""
        size, k = self.config.pool_blocks, self.config.pages_per_block
        if k == 1:
            return _within(blocks, size, first, name)
        inside = _within(blocks, size, 0, name)[..., None]
        pages = jnp.where(inside >= 0, inside * k + first[..., None] + jnp.arange(k, dtype=jnp.int32), -1)
        return pages.reshape(*pages.shape[:-2], -1)

    def _as_blocks(self, pages: jax.Array) -> jax.Array:
        """Pages [layers * n * k, heads, page_size, dim] of all layers as [layers, n, heads, block_size, dim]."""
        config = self.config
        _, heads, size, dim = pages.shape
        split = pages.reshape(config.layers_per_group, -1, config.pages_per_block, heads, size, dim)
        return split.swapaxes(2, 3).reshape(*split.shape[:2], heads, config.block_size, dim)

    def _as_pages(self, blocks: jax.Array) -> jax.Array:
        """The way back from ``_as_blocks``."""
        config = self.config
        layers, n, heads, _, dim = blocks.shape
        split = blocks.reshape(layers, n, heads, config.pages_per_block, config.page_size, dim)
        return split.swapaxes(2, 3).reshape(-1, heads, config.page_size, dim)

    def _span_index(self, layer: ArrayLike) -> Any:
        """i32[]: which of the layers that a block spans ``layer`` is."""
        return _per_layer(self.config, lambda _, index: index)[layer] if self.config.layer_groups else jnp.int32(layer)

    def _check_tokens(self, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> None:
        config = self.config
        tokens = jnp.shape(slot_mapping)[0] if jnp.ndim(slot_mapping) == 1 else None
        for name, value, width in (("k", k, config.head_dim), ("v", v, config.value_head_dim)):
            want = (tokens, config.num_heads, width)
            if tokens is None or value.shape != want or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ShapeMismatchError(
                    f"{name}: got {value.dtype}{list(value.shape)} for slot_mapping {jnp.shape(slot_mapping)}, "
                    f"want floats of shape [tokens, {config.num_heads}, {width}] and one slot a token"
                )


copy_blocks_in_place = jax.jit(lambda pages, src, dst: pages.copy_blocks(src, dst), donate_argnums=0)
"""``copy_blocks`` of ``KVPages``, or of pages of another kind, as a call of its own, the pages donated."""

clear_blocks_in_place = jax.jit(lambda pages, ids: pages.clear_blocks(ids), donate_argnums=0)
"""``clear_blocks`` likewise."""

PageMove = Literal["clear", "copy"]
PAGE_MOVES: dict[PageMove, Any] = {"clear": clear_blocks_in_place, "copy": copy_blocks_in_place}


def page_shapes(config: KVCacheConfig) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of the K and V page arrays, head_dim as stored."""
    pages = config.layers_per_group * config.pages_per_layer
    k_dim, v_dim = config.storage_head_dim(config.head_dim), config.storage_head_dim(config.value_head_dim)
    head = (pages, config.num_heads, config.page_size)
    return (*head, k_dim), (*head, v_dim)


def expanded_slots(slots: jax.Array | CompressedSlotMapping, num_tokens: int) -> jax.Array:
    """i32[num_tokens]: the slots of a mapping of either form."""
    return slots.expand(num_tokens) if isinstance(slots, CompressedSlotMapping) else slots


def _with_pages(stored: jax.Array, ids: jax.Array, pages: jax.Array, *, loop: bool) -> jax.Array:
    """``stored`` with ``pages`` [m, ...] at ``ids`` i32[m]; -1 is left out."""
    if not loop:
        pages = jax.lax.bitcast_convert_type(pages, stored.dtype)
        return stored.at[nowhere_if_invalid(ids, stored.shape[0])].set(pages, mode="drop")

    # XLA's scatter on CPUs lays all the pages out anew first: a seventh of the speed of a copy page by page.
    order = jnp.argsort(ids < 0, stable=True)  # what is left out comes last

    def put(i: Any, stored: jax.Array) -> jax.Array:
        page = jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(pages, order[i], 1), stored.dtype)
        return jax.lax.dynamic_update_slice_in_dim(stored, page, ids[order[i]], 0)

    return jax.lax.fori_loop(0, jnp.sum(ids >= 0), put, stored)


def _per_layer(config: KVCacheConfig, value: Callable[[int, int], int]) -> jax.Array:
    """i32[num_layers]: ``value(group, index in the group)`` of each layer."""
    values = np.zeros(config.num_layers, np.int32)
    for group, members in enumerate(config.groups):
        for index, layer in enumerate(members.layers):
            values[layer] = value(group, index)
    return jnp.asarray(values)


def _within(ids: jax.Array, size: int, first: ArrayLike, name: str) -> jax.Array:
    """``ids`` below ``size`` of a layer whose own begin at ``first`` among all layers'. -1 for what no layer has."""
    report_out_of_range(name, ids, size)  # unreported, it would name something of the next layer
    return jnp.where((ids >= 0) & (ids < size), ids + first, -1)


def _of_layer(scales: jax.Array | None, layer: ArrayLike) -> Any:
    return None if scales is None else jax.lax.dynamic_index_in_dim(scales, layer, keepdims=False)
