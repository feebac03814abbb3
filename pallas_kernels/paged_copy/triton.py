"""Copy in Triton, in place, in two passes.

"All reads before all writes" matters only for a page that is read *and* written. The first pass sets those pages
aside (a program whose page is not among them ends at once, so the usual copy-on-write pays one empty launch); the
second writes every destination, from there or straight from the source.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range
from pallas_kernels.tuning import parameters, power_of_2_up_to
from pallas_kernels.words import as_words, from_words

HEURISTIC = {"words": 4096, "num_warps": 8}


def paged_copy(pages: Any, src: jax.Array, dst: jax.Array) -> Any:
    """``pages[dst] = pages[src]`` on every leaf; see the public function."""
    gpu = target_gpu()
    leaf = jax.tree.leaves(pages)[0]
    shape = {"page_bytes": leaf[0].size * leaf.dtype.itemsize}
    chosen = parameters("paged_copy", "triton", gpu.kind, shape, HEURISTIC)
    return _copy(pages, src, dst, gpu=gpu, **chosen)


@partial(jax.jit, static_argnames=("gpu", "words", "num_warps"))
def _copy(pages: Any, src: jax.Array, dst: jax.Array, *, gpu: Gpu, words: int, num_warps: int) -> Any:
    size = jax.tree.leaves(pages)[0].shape[0]
    report_out_of_range("src", src, size)
    report_out_of_range("dst", dst, size)
    if not src.shape[0]:
        return pages
    src, dst = nowhere_if_invalid(src, size), nowhere_if_invalid(dst, size)
    ignored = (src == size) | (dst == size)
    src, dst = jnp.where(ignored, -1, src), jnp.where(ignored, size, dst)
    written = jnp.zeros(size, bool).at[dst].set(True, mode="drop")
    set_aside = jnp.where(written.at[src].get(mode="clip"), src, -1)
    dst = jnp.where(ignored, -1, dst)

    def copy(leaf: jax.Array) -> jax.Array:
        target = as_words(leaf)
        piece = power_of_2_up_to(words, target.shape[1])
        launch = partial(
            pl.pallas_call,
            grid=(src.shape[0], target.shape[1] // piece),
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
            interpret=gpu.interpret,
        )
        aside = launch(
            partial(set_aside_piece, piece=piece),
            out_shape=jax.ShapeDtypeStruct((src.shape[0], target.shape[1]), target.dtype),
            name="paged_copy_set_aside",
        )(set_aside, target)
        copied = launch(
            partial(copy_piece, piece=piece),
            out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
            input_output_aliases={4: 0},
            name="paged_copy",
        )(src, dst, set_aside, aside, target)
        return from_words(copied, leaf.shape, leaf.dtype)

    return jax.tree.map(copy, pages)


def set_aside_piece(ids: Any, source: Any, aside: Any, *, piece: int) -> None:
    """Refs: ids i32[n] (-1: nothing to do), source [pages, words], aside [n, words]."""
    entry, columns = pl.program_id(0), pl.ds(pl.program_id(1) * piece, piece)
    page = ids[entry]

    @pl.when(page >= 0)
    def _() -> None:
        aside[entry, columns] = source[page, columns]


def copy_piece(src: Any, dst: Any, set_aside: Any, aside: Any, before: Any, pages: Any, *, piece: int) -> None:
    """Refs: src, dst, set_aside i32[n] (-1: ignored); aside [n, words]; pages [pages, words], ``before`` aliased.

    Reads and writes one ref, ``pages``: the source of this piece is a page that nobody writes.
    """
    del before
    entry, columns = pl.program_id(0), pl.ds(pl.program_id(1) * piece, piece)
    page, is_aside = src[entry], set_aside[entry] >= 0

    @pl.when((page >= 0) & is_aside)
    def _() -> None:
        pages[dst[entry], columns] = aside[entry, columns]

    @pl.when((page >= 0) & ~is_aside)
    def _() -> None:
        pages[dst[entry], columns] = pages[page, columns]
