"""K and V blocks in the host's memory, and moving blocks between there and the device.

How a block moves. A swap is one program: a loop over its pairs of blocks, whose body slices one block out of one pool
and updates that slice of the other. The host pool is an argument in ``pinned_host`` memory, so XLA makes of the slice
(or update) that crosses over an asynchronous copy straight between the device's memory and the block's place in the
pool: nothing is staged but one block, neither pool is copied, and no computation runs on the host. Compiled for
Hopper and for TPU v5e, and on CPUs, it is the same program. Other ways, and why not:

- a scatter into the host pool, plain, fails on TPUs; under ``compute_on("device_host")``, compiled for Hopper, it takes
  device memory of the size of the whole host pool, and for TPUs it first lays the blocks out anew;
- gather, copy to the host, scatter there would stage all the blocks at once, where memory is short (not measured);
- on CPUs a gather and a scatter in one jit keep all the blocks in between: 150 ms for 512 MiB, the loop 32 ms.

Dispatched, the loop has a fixed length, so that a GPU need not ask the host before each turn whether there is another,
and it goes through the device's blocks in the order of their ids: on a CPU the tiles of a block, one in each layer, lie
far apart, and most of what is lost against one copy of all bytes is page-table walks, which neighbours share (a fifth
less time). Tiles as flat rows, several blocks a turn and a dispatch each for K and V gained nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from pallas_kernels.page_ids import report_out_of_range
from pyagent_kv_jax.cache.kv_pages import KVPages, page_shapes
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import (
    ConfigError,
    DeviceUnavailableError,
    InvalidBlockError,
    ShapeMismatchError,
    is_concrete,
)
from pyagent_kv_jax.tables.padding import chunks, padded, power_of_two

HOST_MEMORY = "pinned_host"
_LARGEST_CHUNK = 256

Arrays = tuple[jax.Array, jax.Array]
Move = Callable[[Arrays, Arrays, Any, Any, Any], Arrays]


@partial(jax.tree_util.register_dataclass, data_fields=["k_pages", "v_pages"], meta_fields=["pages_per_block"])
@dataclasses.dataclass(frozen=True)
class HostPages:
    """K and V of blocks in pinned host memory, block-major: a block is one contiguous run of each array.

    Attributes:
        k_pages: [num_host_blocks * k, layers_per_group, num_heads, page_size, head_dim], as the device stores them.
        v_pages: the same with the V head_dim.
        pages_per_block: static; k, see ``KVPages``.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    pages_per_block: int = 1

    @classmethod
    def create(cls, config: KVCacheConfig, num_host_blocks: int) -> Self:
        """Blocks of zeros on the host, for the pages of ``config``.

        Raises:
            ConfigError: not a positive count.
            DeviceUnavailableError: no device of the kind here, or one that has no pinned host memory.
        """
        if isinstance(num_host_blocks, bool) or not isinstance(num_host_blocks, int) or num_host_blocks <= 0:
            raise ConfigError(f"num_host_blocks: got {num_host_blocks!r}, want a positive integer")
        device = config.device_type.devices()[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST_MEMORY not in kinds:
            raise DeviceUnavailableError(f"{device}: got memories {kinds}, want {HOST_MEMORY!r} among them")
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=HOST_MEMORY)

        def blocks(page_shape: tuple[int, ...]) -> jax.Array:
            shape = (num_host_blocks * config.pages_per_block, config.layers_per_group, *page_shape[1:])
            # Zeros of numpy, which take no memory: made by JAX they would pass through the device.
            return jax.device_put(np.zeros(shape, config.storage_dtype), sharding, may_alias=False)

        k_shape, v_shape = page_shapes(config)
        return cls(blocks(k_shape), blocks(v_shape), config.pages_per_block)

    @property
    def num_blocks(self) -> int:
        """Blocks of the host pool."""
        return self.k_pages.shape[0] // self.pages_per_block

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.k_pages.nbytes + self.v_pages.nbytes


def swap_out(pages: KVPages, host: HostPages, gpu_ids: ArrayLike, cpu_ids: ArrayLike) -> HostPages:
    """Copy block ``gpu_ids[i]`` of ``pages`` to block ``cpu_ids[i]`` of ``host``, bit for bit.

    With plain values it dispatches and returns at once; ``host`` is donated, so use what is returned. Order comes
    from the values: whoever reads the result, or donates ``pages`` to a later step, does so after the copy. Inside a
    ``jit``, donate ``host`` there; ids cost least as numpy arrays or lists. Quantisation scales do not move.

    Args:
        pages: on the device.
        host: of the same geometry.
        gpu_ids: i32[n]; -1: this pair is left out.
        cpu_ids: i32[n], none twice; -1: this pair is left out.

    Returns:
        The host's pages. Under a transformation a pair with an id outside its pool is left out (in checking mode an
        error), and of equal destinations the last wins.

    Raises:
        InvalidBlockError: an id outside its pool, or a destination named twice; nothing has moved.
        ShapeMismatchError: ids that are not two equally long lists of integers, or blocks of another geometry.
    """
    ids = ("gpu_ids", gpu_ids, pages.config.pool_blocks), ("cpu_ids", cpu_ids, host.num_blocks)
    return HostPages(*_swap(_copy_out, pages, host, *ids), host.pages_per_block)


def swap_in(host: HostPages, pages: KVPages, cpu_ids: ArrayLike, gpu_ids: ArrayLike) -> KVPages:
    """Copy block ``cpu_ids[i]`` of ``host`` to block ``gpu_ids[i]`` of ``pages``, bit for bit.

    ``swap_out`` the other way round: here ``pages`` is donated, and ``gpu_ids`` may name no block twice.
    """
    ids = ("cpu_ids", cpu_ids, host.num_blocks), ("gpu_ids", gpu_ids, pages.config.pool_blocks)
    k_pages, v_pages = _swap(_copy_in, host, pages, *ids)
    return dataclasses.replace(pages, k_pages=k_pages, v_pages=v_pages)


def regrouped(host: HostPages, src: np.ndarray, dst: np.ndarray, pages_per_block: int) -> HostPages:
    """``host``, donated, in blocks of so many pages, with pages ``src`` i32[n] copied to ``dst`` i32[n], none twice.

    As if all reads came before all writes; so all the pages that move pass through the device's memory together.
    """
    k_pages, v_pages = host.k_pages, host.v_pages
    if len(src):
        size = power_of_two(len(src))  # filled up with a pair that is there already
        src, dst = padded(src, size, src[0]), padded(dst, size, dst[0])
        k_pages, v_pages = _copy_within((k_pages, v_pages), src, dst)
    return HostPages(k_pages, v_pages, pages_per_block)


@partial(jax.jit, donate_argnums=0)
def _copy_within(host: Arrays, src: jax.Array, dst: jax.Array) -> Arrays:
    count = src.shape[0]

    def fetch(i: Any, staged: Arrays) -> Any:
        pages = tuple(lax.dynamic_slice_in_dim(x, src[i], 1, axis=0) for x in host)
        across = jax.device_put(pages, jax.memory.Space.Device)
        return jax.tree.map(lambda x, page: lax.dynamic_update_slice_in_dim(x, page, i, axis=0), staged, across)

    def put(i: Any, host: Arrays) -> Any:
        pages = tuple(lax.dynamic_slice_in_dim(x, i, 1, axis=0) for x in staged)
        across = jax.device_put(pages, jax.memory.Space.Host)
        return jax.tree.map(lambda x, page: lax.dynamic_update_slice_in_dim(x, page, dst[i], axis=0), host, across)

    staged = lax.fori_loop(0, count, fetch, tuple(jnp.zeros((count, *x.shape[1:]), x.dtype) for x in host))
    return lax.fori_loop(0, count, put, host)


_Ids = tuple[str, ArrayLike, int]
"""A name for messages, the ids, and the blocks of their pool."""


def _swap(copy: Move, source: KVPages | HostPages, target: KVPages | HostPages, src: _Ids, dst: _Ids) -> Arrays:
    """``target``'s arrays with the blocks ``dst`` replaced by the blocks ``src`` of ``source``."""
    k = _checked_geometry(source, target)
    read, written = (source.k_pages, source.v_pages), (target.k_pages, target.v_pages)
    if not is_concrete(read, written, src[1], dst[1]):
        first, second, count = _valid_first(src, dst)
        return copy(read, written, _pages_of(first, k), _pages_of(second, k), count * k)
    src_ids, dst_ids = (_pages_of(ids, k) for ids in checked_pairs(src, dst))
    order = np.argsort(src_ids if copy is _copy_out else dst_ids)  # no destination is named twice: any order will do
    src_ids, dst_ids = src_ids[order], dst_ids[order]
    for part in chunks(len(src_ids), _LARGEST_CHUNK):
        written = _DISPATCHED[copy](read, written, src_ids[part], dst_ids[part])
    return written


def _pages_of(blocks: Any, k: int) -> Any:
    """[n * k]: the pages of ``blocks`` [n]. They move one by one: k at once XLA lays the pool out anew on GPUs."""
    return blocks if k == 1 else (blocks[:, None] * k + np.arange(k, dtype=np.int32)).reshape(-1)


def _copy_out(pages: Arrays, host: Arrays, gpu_ids: Any, cpu_ids: Any, count: Any) -> Arrays:
    """The first ``count`` pairs, in their order."""
    by_layer = _by_layer(pages, host)

    def copy(i: Any, host: Arrays) -> Any:
        blocks = (lax.dynamic_slice_in_dim(x, gpu_ids[i], 1, axis=1).swapaxes(0, 1) for x in by_layer)
        across = jax.device_put(tuple(blocks), jax.memory.Space.Host)
        return jax.tree.map(
            lambda x, block: lax.dynamic_update_slice_in_dim(x, block, cpu_ids[i], axis=0), host, across
        )

    return lax.fori_loop(0, count, copy, host)


def _copy_in(host: Arrays, pages: Arrays, cpu_ids: Any, gpu_ids: Any, count: Any) -> Arrays:
    """The first ``count`` pairs, in their order."""

    def copy(i: Any, by_layer: Arrays) -> Any:
        blocks = tuple(lax.dynamic_slice_in_dim(x, cpu_ids[i], 1, axis=0) for x in host)
        across = jax.device_put(blocks, jax.memory.Space.Device)
        return jax.tree.map(
            lambda x, block: lax.dynamic_update_slice_in_dim(x, block.swapaxes(0, 1), gpu_ids[i], axis=1),
            by_layer,
            across,
        )

    moved = lax.fori_loop(0, count, copy, _by_layer(pages, host))
    return jax.tree.map(lambda x, before: x.reshape(before.shape), moved, pages)


def _by_layer(pages: Arrays, host: Arrays) -> Arrays:
    """The pages as [layers_per_group, pages_per_layer, num_heads, page_size, head_dim]; costs nothing."""
    k, v = (x.reshape(host[0].shape[1], -1, *x.shape[1:]) for x in pages)
    return k, v


def _dispatched(copy: Move) -> Callable[..., Arrays]:
    """``copy`` of all pairs, jitted, the target donated; one program for each number of pairs."""

    @partial(jax.jit, donate_argnums=1)
    def swap(source: Arrays, target: Arrays, src_ids: jax.Array, dst_ids: jax.Array) -> Arrays:
        return copy(source, target, src_ids, dst_ids, src_ids.shape[0])

    return swap


_DISPATCHED: dict[Move, Callable[..., Arrays]] = {copy: _dispatched(copy) for copy in (_copy_out, _copy_in)}


def _valid_first(src: _Ids, dst: _Ids) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(source ids, destination ids, count) of traced pairs, those with an id that is no block sorted to the end."""
    valid: Any = True
    arrays = []
    for name, values, size in (src, dst):
        ids = jnp.asarray(values)
        if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ShapeMismatchError(f"{name}: got {ids.dtype}{list(ids.shape)}, want int32[n]")
        report_out_of_range(name, ids, size)
        valid &= (ids >= 0) & (ids < size)
        arrays.append(ids.astype(jnp.int32))
    _check_lengths(src[0], arrays[0], dst[0], arrays[1])
    order = jnp.argsort(~valid, stable=True)
    return arrays[0][order], arrays[1][order], jnp.sum(valid, dtype=jnp.int32)


def checked_pairs(src: _Ids, dst: _Ids) -> tuple[np.ndarray, np.ndarray]:
    """Two lists of block ids as i32[n], pairs with a -1 left out.

    Raises:
        InvalidBlockError: an id outside its pool, or a destination named twice.
        ShapeMismatchError: not two equally long lists of integers.
    """
    arrays = []
    for name, values, size in (src, dst):
        ids = np.asarray(values)
        ids = ids.astype(np.int32) if ids.size == 0 else ids
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ShapeMismatchError(f"{name}: got {ids.dtype}{list(ids.shape)}, want int32[n]")
        outside = (ids < -1) | (ids >= size)
        if outside.any():
            raise InvalidBlockError(f"{name}: got {ids[outside][:20].tolist()}, want -1 or 0 to {size - 1}")
        arrays.append(ids.astype(np.int32))
    _check_lengths(src[0], arrays[0], dst[0], arrays[1])
    named = (arrays[0] >= 0) & (arrays[1] >= 0)
    src_ids, dst_ids = arrays[0][named], arrays[1][named]
    once, times = np.unique(dst_ids, return_counts=True)
    if len(once) < len(dst_ids):
        raise InvalidBlockError(f"{dst[0]}: got {once[times > 1][:20].tolist()} more than once, want each block once")
    return src_ids, dst_ids


def _check_lengths(src_name: str, src: Any, dst_name: str, dst: Any) -> None:
    if src.shape != dst.shape:
        raise ShapeMismatchError(f"{dst_name}: got {dst.shape[0]} ids, want {src.shape[0]}, as many as {src_name}")


def _checked_geometry(a: KVPages | HostPages, b: KVPages | HostPages) -> int:
    """Pages of a block, once it is clear that both are of one geometry."""
    host, pages = (a, b) if isinstance(a, HostPages) else (b, a)
    assert isinstance(pages, KVPages)
    assert isinstance(host, HostPages)
    config = pages.config
    for name in ("k_pages", "v_pages"):
        on_host, on_device = getattr(host, name), getattr(pages, name)
        want = (config.layers_per_group, *on_device.shape[1:])
        if on_host.shape[1:] != want or on_host.dtype != on_device.dtype:
            raise ShapeMismatchError(
                f"host {name}: got blocks of {on_host.dtype}{list(on_host.shape[1:])}, "
                f"want {on_device.dtype}{list(want)} as on the device"
            )
    if host.pages_per_block != config.pages_per_block:
        raise ShapeMismatchError(
            f"host pages: got {host.pages_per_block} pages a block, want {config.pages_per_block} as on the device"
        )
    return host.pages_per_block
