"""Copy on TPUs: one DMA a page, from memory to memory, many in flight; staged when pages are both read and written."""

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


def paged_copy(pages: Any, src: jax.Array, dst: jax.Array) -> Any:
    """``pages[dst] = pages[src]`` on every leaf; see the public function."""
    tpu = target_tpu()
    leaves = jax.tree.leaves(pages)
    require_arithmetic(*(leaf.dtype for leaf in leaves))
    require_tiles(*leaves, tpu=tpu)
    return _copy(pages, src, dst, tpu=tpu, in_flight=transfers_at_a_time("paged_copy", tpu, leaves[0]))


@partial(jax.jit, static_argnames=("tpu", "in_flight"))
def _copy(pages: Any, src: jax.Array, dst: jax.Array, *, tpu: Tpu, in_flight: int) -> Any:
    size = jax.tree.leaves(pages)[0].shape[0]
    report_out_of_range("src", src, size)
    report_out_of_range("dst", dst, size)
    if src.size == 0:
        return pages
    src, dst, overlap = _plan(src, dst, size)
    return jax.tree.map(lambda leaf: _copy_leaf(leaf, src, dst, overlap, tpu, in_flight), pages)


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


def _copy_leaf(
    pages: jax.Array, src: jax.Array, dst: jax.Array, overlap: jax.Array, tpu: Tpu, in_flight: int
) -> jax.Array:
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    staging = jax.ShapeDtypeStruct((*src.shape, *pages.shape[1:]), pages.dtype)
    pieces = id_pieces(src)
    ids = pieces.spec(lambda turn, i, _: i)
    copied, _ = pl.pallas_call(
        partial(_kernel, number=src.size, in_flight=in_flight),
        out_shape=(jax.ShapeDtypeStruct(pages.shape, pages.dtype), staging),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2, pieces.number),
            in_specs=[ids, ids, anywhere],
            out_specs=(anywhere, anywhere),
            scratch_shapes=[pltpu.SemaphoreType.DMA((in_flight,))],
        ),
        input_output_aliases={3: 0},
        compiler_params=compiler_params("arbitrary", "arbitrary"),
        interpret=tpu.interpret,
        name="paged_copy",
    )(overlap, pieces.fill(src), pieces.fill(dst), pages)
    return copied


def _kernel(
    overlap: Any,
    src: Any,
    dst: Any,
    unaliased: Any,
    pages: Any,
    staging: Any,
    semaphores: Any,
    *,
    number: int,
    in_flight: int,
) -> None:
    """overlap i32[1] and a piece of the ``number`` pairs in scalar memory; pages, and staging for as many, in HBM.

    Every piece has two turns. The second ones come after all the first: so all reads come before all writes.
    """
    del unaliased  # the same memory as pages
    turn, first = pl.program_id(0), pl.program_id(1) * src.shape[0]
    count = jnp.minimum(src.shape[0], number - first)

    def copy_all(source: Any, target: Any) -> None:
        """Copy ``source(i)`` to ``target(i)`` for every pair i of the piece."""

        def copy(index: Any) -> tuple[Any, Any]:
            semaphore = semaphores.at[index % in_flight]
            return src[index] >= 0, pltpu.make_async_copy(source(index), target(index), semaphore)

        copy_in_flight(count, copy, in_flight)

    def read(index: Any) -> Any:
        return pages.at[jnp.maximum(src[index], 0)]

    def staged(index: Any) -> Any:
        return staging.at[first + index]

    def write(index: Any) -> Any:
        return pages.at[jnp.maximum(dst[index], 0)]

    pl.when((turn == 0) & (overlap[0] == 0))(lambda: copy_all(read, write))
    pl.when((turn == 0) & (overlap[0] != 0))(lambda: copy_all(read, staged))
    pl.when((turn == 1) & (overlap[0] != 0))(lambda: copy_all(staged, write))
