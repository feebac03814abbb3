"""Copy on TPUs: one DMA a page, from memory to memory, many in flight; staged when pages are both read and written."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import copy_in_flight, require_scalars, require_tiles, require_tpu
from pallas_kernels.page_ids import report_out_of_range

IN_FLIGHT = 16


def paged_copy(pages: Any, src: jax.Array, dst: jax.Array) -> Any:
    """``pages[dst] = pages[src]`` on every leaf; see the public function."""
    interpret = require_tpu()
    require_tiles(*jax.tree.leaves(pages), interpret=interpret)
    require_scalars(2 * src.size)
    return _copy(pages, src, dst, interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def _copy(pages: Any, src: jax.Array, dst: jax.Array, *, interpret: Any) -> Any:
    size = jax.tree.leaves(pages)[0].shape[0]
    report_out_of_range("src", src, size)
    report_out_of_range("dst", dst, size)
    if src.size == 0:
        return pages
    src, dst, overlap = _plan(src, dst, size)
    return jax.tree.map(lambda leaf: _copy_leaf(leaf, src, dst, overlap, interpret), pages)


def _plan(src: jax.Array, dst: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs sorted by destination: (src, dst, overlap i32[1]).

    Pairs that do nothing become -1, as do all but the last of equal destinations: copies in flight at once may land
    in any order, even mixed. ``overlap``: whether some page is read by one pair and written by another.
    """
    valid = (src >= 0) & (src < size) & (dst >= 0) & (dst < size) & (src != dst)
    order = jnp.argsort(jnp.where(valid, dst, -1), stable=True)
    src, dst = jnp.where(valid, src, -1)[order], jnp.where(valid, dst, -1)[order]
    again = jnp.append(dst[1:] == dst[:-1], False)
    src, written = jnp.where(again, -1, src), dst
    dst = jnp.where(again, -1, dst)
    found = jnp.searchsorted(written, src)
    overlap = jnp.any((src >= 0) & (written[jnp.minimum(found, src.size - 1)] == src))
    return src, dst, overlap.astype(jnp.int32).reshape(1)


def _copy_leaf(pages: jax.Array, src: jax.Array, dst: jax.Array, overlap: jax.Array, interpret: Any) -> jax.Array:
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    staging = jax.ShapeDtypeStruct((*src.shape, *pages.shape[1:]), pages.dtype)
    copied, _ = pl.pallas_call(
        _kernel,
        out_shape=(jax.ShapeDtypeStruct(pages.shape, pages.dtype), staging),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(),
            in_specs=[anywhere],
            out_specs=(anywhere, anywhere),
            scratch_shapes=[pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
        ),
        input_output_aliases={3: 0},
        interpret=interpret,
        name="paged_copy",
    )(src, dst, overlap, pages)
    return copied


def _kernel(src: Any, dst: Any, overlap: Any, unaliased: Any, pages: Any, staging: Any, semaphores: Any) -> None:
    """src, dst i32[n] and overlap i32[1] in scalar memory; pages and staging, n pages, in HBM."""
    del unaliased  # the same memory as pages

    def copy_all(source: Any, target: Any) -> None:
        """Copy ``source(i)`` to ``target(i)`` for every pair i."""

        def copy(index: Any) -> tuple[Any, Any]:
            semaphore = semaphores.at[index % IN_FLIGHT]
            return src[index] >= 0, pltpu.make_async_copy(source(index), target(index), semaphore)

        copy_in_flight(0, src.shape[0], copy, IN_FLIGHT)

    def read(index: Any) -> Any:
        return pages.at[jnp.maximum(src[index], 0)]

    def staged(index: Any) -> Any:
        return staging.at[index]

    def write(index: Any) -> Any:
        return pages.at[jnp.maximum(dst[index], 0)]

    @pl.when(overlap[0] == 0)
    def _() -> None:
        copy_all(read, write)

    @pl.when(overlap[0] != 0)
    def _() -> None:  # copy_all returns when every copy is done, so all reads come before all writes
        copy_all(read, staged)
        copy_all(staged, write)
