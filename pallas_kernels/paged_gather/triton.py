"""Gather in Triton: one program copies one piece of one page."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.tuning import parameters, power_of_2_up_to
from pallas_kernels.words import as_words, from_words

# A page in pieces of 16 KiB: four loads of 16 bytes in flight for each of 256 threads.
HEURISTIC = {"words": 4096, "num_warps": 8}


def paged_gather(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """``pages[ids]``, zeros where the id is no page; see the public function."""
    gpu = target_gpu()
    shape = {"page_bytes": pages[0].size * pages.dtype.itemsize}
    chosen = parameters("paged_gather", "triton", gpu.kind, shape, HEURISTIC)
    return _gather(pages, ids, gpu=gpu, **chosen)


@partial(jax.jit, static_argnames=("gpu", "words", "num_warps"))
def _gather(pages: jax.Array, ids: jax.Array, *, gpu: Gpu, words: int, num_warps: int) -> jax.Array:
    report_out_of_range("ids", ids, pages.shape[0])
    out_shape = (ids.shape[0], *pages.shape[1:])
    if not ids.shape[0]:
        return jnp.zeros(out_shape, pages.dtype)
    source = as_words(pages)
    piece = power_of_2_up_to(words, source.shape[1])
    gathered = pl.pallas_call(
        partial(gather_piece, piece=piece, num_pages=pages.shape[0]),
        out_shape=jax.ShapeDtypeStruct((ids.shape[0], source.shape[1]), source.dtype),
        grid=(ids.shape[0], source.shape[1] // piece),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=gpu.interpret,
        name="paged_gather",
    )(ids, source)
    return from_words(gathered, out_shape, pages.dtype)


def gather_piece(ids: Any, source: Any, out: Any, *, piece: int, num_pages: int) -> None:
    """Refs: ids i32[n], source [pages, words], out [n, words]."""
    entry, columns = pl.program_id(0), pl.ds(pl.program_id(1) * piece, piece)
    page = ids[entry]
    inside = (page >= 0) & (page < num_pages)
    at = source.at[jnp.where(inside, page, 0), columns]
    out[entry, columns] = plgpu.load(at, mask=jnp.full(piece, inside), other=jnp.zeros(piece, source.dtype))
