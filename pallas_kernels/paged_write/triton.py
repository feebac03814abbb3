"""Write in Triton: one program takes a few tokens, all heads, K and V, and quantises on the way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.number_format import per_head
from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range
from pallas_kernels.paged_write.reference import expand_runs
from pallas_kernels.triton_numbers import encode, viewed
from pallas_kernels.triton_tiles import powers_of_2
from pallas_kernels.tuning import parameters

# Two tokens of 8 heads of 128 are 4 KiB of K and as much of V: 32 bytes of each for each of 128 threads.
HEURISTIC = {"tokens": 2, "num_warps": 4}


def paged_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: Any,
    v_scale: Any,
    kv_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Scatter tokens into slots, in place; see the public function."""
    gpu = target_gpu()
    shape = {"kv_heads": k.shape[1], "head_dim": k.shape[2], "itemsize": kv_dtype.itemsize}
    chosen = parameters("paged_write", "triton", gpu.kind, shape, HEURISTIC)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _write(k_pages, v_pages, k, v, slot_mapping, **scales, kv_dtype=kv_dtype, gpu=gpu, **chosen)


@partial(jax.jit, static_argnames=("kv_dtype", "gpu", "tokens", "num_warps"))
def _write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: Any,
    v_scale: Any,
    kv_dtype: jnp.dtype,
    gpu: Gpu,
    tokens: int,
    num_warps: int,
) -> tuple[jax.Array, jax.Array]:
    capacity = k.shape[0]
    if not capacity:
        return k_pages, v_pages
    if slot_mapping.ndim == 2:
        slots, rows = expand_runs(slot_mapping, capacity)
    else:
        slots, rows = slot_mapping, None
    num_pages, kv_heads, block_size, _ = k_pages.shape
    report_out_of_range("slot_mapping", slots, num_pages * block_size)
    inside = nowhere_if_invalid(slots // block_size, num_pages) < num_pages
    slots = jnp.where(inside, slots, -1)
    scales = [None if s is None else jnp.broadcast_to(per_head(s), kv_heads) for s in (k_scale, v_scale)]
    inputs = [slots, rows, *scales, k, v, viewed(k_pages, kv_dtype, gpu), viewed(v_pages, kv_dtype, gpu)]
    given = [x for x in inputs if x is not None]
    which = [x is not None for x in inputs]
    written = pl.pallas_call(
        partial(_kernel, which=which, tokens=tokens, kv_dtype=kv_dtype),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[-2:]],
        grid=(pl.cdiv(capacity, tokens),),
        input_output_aliases={len(given) - 2: 0, len(given) - 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=gpu.interpret,
        name="paged_write",
    )(*given)
    k_written, v_written = (jax.lax.bitcast_convert_type(pages, k_pages.dtype) for pages in written)
    return k_written, v_written


def _kernel(*refs: Any, which: list[bool], tokens: int, kv_dtype: jnp.dtype) -> None:
    given = iter(refs[:-2])
    slots, rows, k_scale, v_scale, k, v, _, _ = (next(given) if there else None for there in which)
    first = pl.program_id(0) * tokens
    for i in range(tokens):
        write_token(slots, rows, k_scale, k, refs[-2], entry=first + i, kv_dtype=kv_dtype)
        write_token(slots, rows, v_scale, v, refs[-1], entry=first + i, kv_dtype=kv_dtype)


def write_token(slots: Any, rows: Any, scale: Any, values: Any, pages: Any, *, entry: Any, kv_dtype: Any) -> None:
    """Refs: slots i32[T], rows None or i32[T] (the token of each entry), scale None or f32[kv_heads],
    values [T, kv_heads, d], pages [pages, kv_heads, block_size, D >= d]."""
    (capacity, kv_heads, head_dim), block_size = values.shape, pages.shape[2]
    at = jnp.minimum(entry, capacity - 1)
    slot = slots[at]
    valid = (slot >= 0) & (entry < capacity)
    slot = jnp.maximum(slot, 0)
    page, offset = jax.lax.div(slot, block_size), jax.lax.rem(slot, block_size)
    row = at if rows is None else rows[at]
    for heads in powers_of_2(kv_heads):
        for dims in powers_of_2(head_dim):
            numbers = values[row, heads, dims].astype(jnp.float32)
            if scale is not None:
                numbers = numbers / scale[heads][:, None]
            stored = encode(numbers, pages.dtype, kv_dtype)
            plgpu.store(pages.at[page, heads, offset, dims], stored, mask=jnp.full(stored.shape, valid))
