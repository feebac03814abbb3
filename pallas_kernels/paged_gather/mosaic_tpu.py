"""Gather on TPUs: one DMA a page, from memory to memory, many in flight."""

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


def paged_gather(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """``pages[ids]``, zeros where the id is no page; see the public function."""
    interpret = require_tpu()
    require_tiles(pages, interpret=interpret)
    require_scalars(ids.size)
    return _gather(pages, ids, interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def _gather(pages: jax.Array, ids: jax.Array, *, interpret: Any) -> jax.Array:
    report_out_of_range("ids", ids, pages.shape[0])
    if ids.size == 0:
        return jnp.zeros((0, *pages.shape[1:]), pages.dtype)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((*ids.shape, *pages.shape[1:]), pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM(pages.shape[1:], pages.dtype),
                pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
            ],
        ),
        interpret=interpret,
        name="paged_gather",
    )(ids, pages)


def _kernel(ids: Any, pages: Any, out: Any, zeros: Any, semaphores: Any) -> None:
    """ids i32[n] in scalar memory, pages and out [n, kv_heads, block_size, head_dim] in HBM, zeros one page."""
    num_pages = pages.shape[0]
    zeros[...] = jnp.zeros_like(zeros)

    def is_page(index: Any) -> Any:
        return (ids[index] >= 0) & (ids[index] < num_pages)

    def copy_page(index: Any) -> tuple[Any, Any]:
        page = jnp.where(is_page(index), ids[index], 0)
        semaphore = semaphores.at[index % IN_FLIGHT]
        return is_page(index), pltpu.make_async_copy(pages.at[page], out.at[index], semaphore)

    def copy_zeros(index: Any) -> tuple[Any, Any]:
        semaphore = semaphores.at[index % IN_FLIGHT]
        return ~is_page(index), pltpu.make_async_copy(zeros, out.at[index], semaphore)

    copy_in_flight(0, ids.shape[0], copy_page, IN_FLIGHT)
    copy_in_flight(0, ids.shape[0], copy_zeros, IN_FLIGHT)
