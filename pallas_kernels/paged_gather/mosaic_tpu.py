"""Gather on TPUs: one DMA a page, from memory to memory, many in flight."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import (
    compiler_params,
    copy_in_flight,
    id_pieces,
    require_arithmetic,
    require_tiles,
    transfers_at_a_time,
)
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.tpu import Tpu, target_tpu


def paged_gather(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """``pages[ids]``, zeros where the id is no page; see the public function."""
    tpu = target_tpu()
    require_arithmetic(pages.dtype)
    require_tiles(pages, tpu=tpu)
    return _gather(pages, ids, tpu=tpu, in_flight=transfers_at_a_time("paged_gather", tpu, pages))


@partial(jax.jit, static_argnames=("tpu", "in_flight"))
def _gather(pages: jax.Array, ids: jax.Array, *, tpu: Tpu, in_flight: int) -> jax.Array:
    report_out_of_range("ids", ids, pages.shape[0])
    if ids.size == 0:
        return jnp.zeros((0, *pages.shape[1:]), pages.dtype)
    pieces = id_pieces(ids)
    return pl.pallas_call(
        partial(_kernel, number=ids.size, in_flight=in_flight),
        out_shape=jax.ShapeDtypeStruct((*ids.shape, *pages.shape[1:]), pages.dtype),
        grid=(pieces.number,),
        in_specs=[pieces.spec(lambda i: i), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.VMEM(pages.shape[1:], pages.dtype), pltpu.SemaphoreType.DMA((in_flight,))],
        compiler_params=compiler_params("arbitrary"),
        interpret=tpu.interpret,
        name="paged_gather",
    )(pieces.fill(ids), pages)


def _kernel(ids: Any, pages: Any, out: Any, zeros: Any, semaphores: Any, *, number: int, in_flight: int) -> None:
    """A piece of the ``number`` ids in scalar memory, pages and out [number, kv_heads, block_size, head_dim] in HBM,
    zeros one page."""
    num_pages = pages.shape[0]
    first = pl.program_id(0) * ids.shape[0]
    count = jnp.minimum(ids.shape[0], number - first)
    zeros[...] = jnp.zeros_like(zeros)

    def is_page(index: Any) -> Any:
        return (ids[index] >= 0) & (ids[index] < num_pages)

    def copy_page(index: Any) -> tuple[Any, Any]:
        page = jnp.where(is_page(index), ids[index], 0)
        semaphore = semaphores.at[index % in_flight]
        return is_page(index), pltpu.make_async_copy(pages.at[page], out.at[first + index], semaphore)

    def copy_zeros(index: Any) -> tuple[Any, Any]:
        semaphore = semaphores.at[index % in_flight]
        return ~is_page(index), pltpu.make_async_copy(zeros, out.at[first + index], semaphore)

    copy_in_flight(count, copy_page, in_flight)
    copy_in_flight(count, copy_zeros, in_flight)
