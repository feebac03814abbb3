"""K and V of blocks that live on a mesh axis: each device stores, and attends over, the blocks that it owns."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from pallas_kernels import CompressedSlotMapping
from pallas_kernels.page_ids import report_out_of_range
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.kv_pages import KVPages, expanded_slots, page_shapes
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy, all_reduce_states
from pyagent_kv_jax.distributed.on_ranks import check_kv_heads, on_ranks, sinks_of_rank, static_and_arrays
from pyagent_kv_jax.distributed.owned.owned_blocks import local_ids
from pyagent_kv_jax.errors import ConfigError, ShapeMismatchError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "k_scale", "v_scale"],
    meta_fields=["config", "mesh", "axis", "tensor_axis"],
)
@dataclasses.dataclass(frozen=True)
class OwnedKVPages:
    """``KVPages`` over a mesh, block by block: of N blocks, device d of D on ``axis`` has those that it owns.

    Goes with a ``DistributedBlockTable`` of the same mesh, axis and N, whose ids and slots are of all devices together.
    A page never leaves its device: queries, new tokens and partial attentions do.

    Attributes:
        k_pages: [D * layers_per_group * pages_per_layer / D, num_heads, page_size, head_dim], sharded over ``axis``
            (each device's part is the K pages of a cache of N / D blocks) and, by heads, over ``tensor_axis``.
        v_pages: the same with the V head_dim.
        k_scale: f32[num_layers, num_heads], as of ``KVPages``; None unless the dtype is quantised.
        v_scale: likewise.
        config: static, of all devices together.
        mesh: static.
        axis: static, name of the axis that blocks are spread over.
        tensor_axis: static, name of the axis that heads are spread over, or None.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    config: KVCacheConfig
    mesh: Mesh
    axis: str
    tensor_axis: str | None

    @classmethod
    def create(cls, config: KVCacheConfig, mesh: Mesh, axis: str = "workers", tensor_axis: str | None = None) -> Self:
        """Empty pages.

        Raises:
            ConfigError: an axis that the mesh lacks or that is named twice, blocks or heads that it does not divide,
                several layer groups, kernel blocks that are not whole blocks.
        """
        for name in (axis, *((tensor_axis,) if tensor_axis is not None else ())):
            if name not in mesh.axis_names or axis == tensor_axis:
                raise ConfigError(f"axis, tensor_axis: got {axis!r}, {tensor_axis!r}, want two of {mesh.axis_names}")
        tensor_size = 1 if tensor_axis is None else mesh.shape[tensor_axis]
        for what, got, size in (
            ("num_blocks", config.pool_blocks, mesh.shape[axis]),
            ("num_heads", config.num_heads, tensor_size),
        ):
            if got % size:
                raise ConfigError(f"{what}: got {got} over {size} devices, want a multiple of {size}")
        if config.num_kernel_blocks is not None or len(config.groups) > 1:
            given = f"num_kernel_blocks {config.num_kernel_blocks}, {len(config.groups)} layer groups"
            raise ConfigError(f"config: got {given}, want None and one group for owned blocks")

        def empty() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, config.storage_dtype) for shape in page_shapes(config))

        k_pages, v_pages = jax.jit(empty, out_shardings=NamedSharding(mesh, P(axis, tensor_axis)))()
        k_scale = v_scale = None
        if config.kv_dtype.is_quantized:
            shape, place = (config.num_layers, config.num_heads), NamedSharding(mesh, P(None, tensor_axis))
            k_scale, v_scale = (jnp.ones(shape, jnp.float32, device=place) for _ in range(2))
        return cls(k_pages, v_pages, k_scale, v_scale, config, mesh, axis, tensor_axis)

    def write(
        self, layer: ArrayLike, k: jax.Array, v: jax.Array, slot_mapping: jax.Array | CompressedSlotMapping
    ) -> Self:
        """Store ``k`` and ``v`` of a layer, each token on the owner of its slot's block. See ``KVPages.write``."""

        def on_device(pages: KVPages, layer: Any, k: Any, v: Any, slots: Any) -> Any:
            pages = pages.write(layer, k, v, self._local_slots(expanded_slots(slots, k.shape[0])))
            return pages.k_pages, pages.v_pages

        check_kv_heads(self.config, k, v)
        self._report(slot_mapping, k.shape[0])
        over_heads = P(None, self.tensor_axis)
        specs, out_specs = (P(), over_heads, over_heads, P()), (P(self.axis, self.tensor_axis),) * 2
        arrays = self._on_devices(on_device, (jnp.int32(layer), k, v, slot_mapping), specs, out_specs)
        return dataclasses.replace(self, k_pages=arrays[0], v_pages=arrays[1])

    def attend(
        self, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, **options: Any
    ) -> tuple[jax.Array, Self]:
        """Write this step's K and V of ``layer``, then attend causally over all the rows hold, wherever it is.

        Every device attends over the blocks it owns; the partial attentions are merged by ``all_reduce_states``.

        Args:
            layer: i32[], may be traced.
            q: [T, q_heads, head_dim], of all heads.
            k: [T, num_heads, head_dim].
            v: [T, num_heads, v_head_dim].
            meta: of this step, as ``DistributedBlockTable.extend`` makes it.
            **options: as for ``KVPages.attend``, sinks counted once; and ``strategy``, an ``AllReduceStrategy``: how
                partial attentions are merged.

        Returns:
            ([T, q_heads, v_head_dim] of q's dtype, the new pages).

        Raises:
            ShapeMismatchError: shapes do not fit the cache.
        """
        out, _, pages = self.attend_with_lse(layer, q, k, v, meta, **options)
        return out, pages

    def attend_with_lse(
        self,
        layer: ArrayLike,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: AttentionMetadata,
        *,
        sinks: jax.Array | None = None,
        strategy: AllReduceStrategy | str = AllReduceStrategy.NCCL,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, Self]:
        """``attend``, and the LSE f32[T, q_heads], natural log: (out, lse, pages)."""

        def on_device(pages: KVPages, layer: Any, q: Any, k: Any, v: Any, meta: Any, sinks: Any, traced: Any) -> Any:
            rank, size = lax.axis_index(self.axis), lax.axis_size(self.axis)
            local = dataclasses.replace(
                meta,
                block_tables=local_ids(meta.block_tables, rank, self._blocks_per_device),
                slot_mapping=self._local_slots(expanded_slots(meta.slot_mapping, k.shape[0])),
            )
            out, lse, pages = pages.attend_share(
                layer, q, k, v, local, sinks=sinks_of_rank(sinks, rank), **static, **traced
            )
            form = "xla" if self.config.device_type is DeviceType.CPU else None
            out, lse = all_reduce_states(out, lse, self.axis, size, strategy, implementation=form)
            return out, lse, pages.k_pages, pages.v_pages

        check_kv_heads(self.config, k, v)
        self._report(meta.slot_mapping, k.shape[0])
        groups = self.config.num_heads
        if q.ndim != 3 or q.shape[1] % groups or (sinks is not None and sinks.shape != q.shape[1:2]):
            sunk = "" if sinks is None else f", sinks of shape {list(sinks.shape)}"
            want = f"[tokens, a multiple of {groups} heads, {self.config.head_dim}], and one sink a head"
            raise ShapeMismatchError(f"q: got shape {list(q.shape)}{sunk}, want {want}")
        static, traced = static_and_arrays(options)
        heads, pages = P(None, self.tensor_axis), P(self.axis, self.tensor_axis)
        out, lse, k_pages, v_pages = self._on_devices(
            on_device,
            (jnp.int32(layer), q, k, v, meta, sinks, traced),
            (P(), heads, heads, heads, P(), P(self.tensor_axis), P()),
            (heads, heads, pages, pages),
        )
        return out, lse, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the page arrays on all devices of both axes together."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    @property
    def _blocks_per_device(self) -> int:
        return self.config.pool_blocks // self.mesh.shape[self.axis]

    def _local_slots(self, slots: jax.Array) -> jax.Array:
        """Slots of all blocks as slots of this device's; -1 for those of others."""
        return local_ids(slots, lax.axis_index(self.axis), self._blocks_per_device * self.config.block_size)

    def _report(self, slots: jax.Array | CompressedSlotMapping, num_tokens: int) -> None:
        """In checking mode, an error for a slot that no device has; else its token is dropped."""
        report_out_of_range(
            "slot_mapping", expanded_slots(slots, num_tokens), self.config.pool_blocks * self.config.block_size
        )

    def _on_devices(self, function: Any, arguments: tuple[Any, ...], specs: tuple[Any, ...], out_specs: Any) -> Any:
        """``function(the device's own KVPages, *arguments)`` on every device."""
        heads = self.config.num_heads // (1 if self.tensor_axis is None else self.mesh.shape[self.tensor_axis])
        own = dataclasses.replace(self.config, num_blocks=self._blocks_per_device, num_heads=heads)

        def run(arrays: tuple[Any, ...], *arguments: Any) -> Any:
            k_pages, v_pages, k_scale, v_scale = arrays
            return function(KVPages(k_pages, v_pages, k_scale, v_scale, own), *arguments)

        page, scale = P(self.axis, self.tensor_axis), P(None, self.tensor_axis)
        mapped = on_ranks(run, self.mesh, ((page, page, scale, scale), *specs), out_specs)
        return mapped((self.k_pages, self.v_pages, self.k_scale, self.v_scale), *arguments)
