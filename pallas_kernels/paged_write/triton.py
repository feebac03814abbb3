"""Write in Triton: one program takes a few tokens, all heads, K and V, and quantises on the way."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.compressed_slots import CompressedSlotMapping
from pallas_kernels.number_format import per_head
from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range
from pallas_kernels.paged_write.reference import slots_and_tokens
from pallas_kernels.triton_numbers import encode, join_pairs, stored_columns
from pallas_kernels.triton_tiles import powers_of_2
from pallas_kernels.tuning import next_power_of_2, parameters
from pallas_kernels.words import as_bits, as_pairs, from_words, overflows_offsets, require_pairs


def paged_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array | CompressedSlotMapping,
    *,
    k_scale: Any,
    v_scale: Any,
    kv_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Scatter tokens into slots, in place; see the public function."""
    gpu = target_gpu()
    shape = {"kv_heads": k.shape[1], "head_dim": k.shape[2], "itemsize": kv_dtype.itemsize}
    chosen = parameters("paged_write", "triton", gpu.kind, shape, heuristic(k.shape[1] * k.shape[2]))
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _write(k_pages, v_pages, k, v, slot_mapping, **scales, kv_dtype=kv_dtype, gpu=gpu, **chosen)


def heuristic(numbers: int) -> dict[str, int]:
    """For tokens of so many numbers: 2048 of K and of V a program, 16 of each a thread, more only with more threads."""
    return {"tokens": min(max(2048 // next_power_of_2(numbers), 1), 8), "num_warps": 4 if numbers <= 2048 else 8}


@partial(jax.jit, static_argnames=("kv_dtype", "gpu", "tokens", "num_warps"))
def _write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array | CompressedSlotMapping,
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
    slots, rows = slots_and_tokens(slot_mapping, capacity)
    num_pages, kv_heads, block_size, _ = k_pages.shape
    report_out_of_range("slot_mapping", slots, num_pages * block_size)
    inside = nowhere_if_invalid(slots // block_size, num_pages) < num_pages
    slots = jnp.where(inside, slots, -1)
    k_scale, v_scale = (None if s is None else jnp.broadcast_to(per_head(s), kv_heads) for s in (k_scale, v_scale))
    targets = writable(k_pages, k.shape[2]), writable(v_pages, v.shape[2])
    given = Operands(slots, rows, k_scale, v_scale, k, v, *targets)
    num_inputs = len(jax.tree.leaves(given))
    written = pl.pallas_call(
        partial(write_tokens, tokens=tokens, kv_dtype=kv_dtype, gpu=gpu),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in targets],
        grid=(pl.cdiv(capacity, tokens),),
        input_output_aliases={num_inputs - 2: 0, num_inputs - 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=gpu.interpret,
        name="paged_write",
    )(given)
    k_written, v_written = written
    return from_words(k_written, k_pages.shape, k_pages.dtype), from_words(v_written, v_pages.shape, v_pages.dtype)


def writable(pages: jax.Array, head_dim: int) -> jax.Array:
    """The pages as unsigned integers: their elements, or words of two where only those can be addressed."""
    if not overflows_offsets(pages):
        return as_bits(pages)
    require_pairs(pages, head_dim)
    return as_pairs(pages)


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
        slots: i32[T], the slot of each entry; -1: dropped.
        rows: None, or i32[T], the token of each entry.
        k_scale, v_scale: None, or f32[kv_heads].
        k, v: [T, kv_heads, d].
        k_pages, v_pages: [pages, kv_heads, block_size, D >= d], unsigned bits, or [..., D / 2], words of two
            one-byte numbers; aliased, never read.
    """

    slots: Any
    rows: Any
    k_scale: Any
    v_scale: Any
    k: Any
    v: Any
    k_pages: Any
    v_pages: Any


def write_tokens(given: Operands, k_pages: Any, v_pages: Any, *, tokens: int, kv_dtype: jnp.dtype, gpu: Gpu) -> None:
    """Refs: what is given; the pages, to write to."""
    first = pl.program_id(0) * tokens
    for entry in (first + i for i in range(tokens)):
        for values, scale, pages in ((given.k, given.k_scale, k_pages), (given.v, given.v_scale, v_pages)):
            write_token(given.slots, given.rows, scale, values, pages, entry=entry, kv_dtype=kv_dtype, gpu=gpu)


def write_token(
    slots: Any, rows: Any, scale: Any, values: Any, pages: Any, *, entry: Any, kv_dtype: jnp.dtype, gpu: Gpu
) -> None:
    """One entry of K or of V; refs as in ``Operands``."""
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
            stored = encode(numbers, kv_dtype, gpu)
            if stored.dtype != pages.dtype:
                stored = join_pairs(stored)
            at = pages.at[page, heads, offset, stored_columns(dims, pages, kv_dtype)]
            plgpu.store(at, stored, mask=jnp.full(stored.shape, valid))
