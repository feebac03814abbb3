"""Write on TPUs: read, change and write back whole tiles, each tile once.

A tile of TPU memory holds the same head of 8 to 32 neighbouring tokens, so a token cannot be written alone. Tokens
that are neighbours both in the call and in the pages make a *run* within one strip of rows of a page; runs are
sorted by slot, so that runs of one strip follow one another and find it still in VMEM: no update is lost, and
Pallas's own pipeline overlaps the reads and writes of strips with the work on them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_slots import CompressedSlotMapping
from pallas_kernels.mosaic_tpu import (
    compiler_params,
    require_arithmetic,
    require_parameters,
    require_tiles,
    tile_rows,
)
from pallas_kernels.number_format import encode, per_head
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.paged_write.reference import slots_and_tokens
from pallas_kernels.tpu import Tpu, target_tpu
from pallas_kernels.tuning import next_power_of_2, parameters

FEW_TOKENS = 512
MAX_RUNS = 2**16  # of a call: three numbers each in scalar memory
MAX_STRIP_ROWS = 128
MAX_STRIP_BYTES = 2**20


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
    """Write tokens into slots; see the public function."""
    tpu = target_tpu()
    require_tiles(k_pages, v_pages, tpu=tpu)
    require_arithmetic(k.dtype, v.dtype, kv_dtype)
    if k.shape[0] == 0:
        return k_pages, v_pages
    chosen = choose_parameters(tpu, k_pages, v_pages, k.shape[0])
    return _write(k_pages, v_pages, k, v, slot_mapping, k_scale, v_scale, kv_dtype=kv_dtype, tpu=tpu, **chosen)


def choose_parameters(tpu: Tpu, k_pages: jax.Array, v_pages: jax.Array, num_tokens: int) -> dict[str, int]:
    """Rows of a strip, from the tuning table or by rule.

    Raises:
        ValueError: the table's are no whole tiles that divide a page.
    """
    _, kv_heads, block_size, head_dim = k_pages.shape
    shape = {
        "kv_heads": kv_heads,
        "block_size": block_size,
        "head_dim": head_dim,
        "itemsize": k_pages.dtype.itemsize,
        "tokens": next_power_of_2(num_tokens),
    }
    chosen = parameters("paged_write", "mosaic_tpu", tpu.kind, shape, heuristic(k_pages, v_pages, num_tokens))
    rows, fewest = chosen["strip_rows"], _fewest_rows(k_pages)
    fit = rows == block_size or (rows >= fewest and rows % fewest == 0 and block_size % rows == 0)
    require_parameters("paged_write", chosen, fit, f"{block_size} or multiples of {fewest} that divide it")
    return chosen


def heuristic(k_pages: jax.Array, v_pages: jax.Array, num_tokens: int) -> dict[str, int]:
    """Rows of a strip: whole tiles that divide a page; few where tokens are few (decode), many for prefill."""
    _, kv_heads, block_size, _ = k_pages.shape
    rows = _fewest_rows(k_pages)
    if block_size % rows:
        return {"strip_rows": block_size}
    if num_tokens <= FEW_TOKENS:
        return {"strip_rows": rows}
    row_bytes = kv_heads * max(k_pages.shape[3], v_pages.shape[3]) * k_pages.dtype.itemsize
    limit = min(MAX_STRIP_ROWS, MAX_STRIP_BYTES // row_bytes)
    while block_size % (2 * rows) == 0 and 2 * rows <= limit:
        rows *= 2
    return {"strip_rows": rows}


def _fewest_rows(k_pages: jax.Array) -> int:
    return max(tile_rows(k_pages.dtype), 16)


class Runs(NamedTuple):
    """Runs sorted by slot; only the first ``number`` exist. All i32[tokens], but ``number`` i32[].

    A run puts tokens ``token``, +1, ... into slots ``slot``, +1, ..., ``length`` of them, all in one strip. There is
    always one, if only of length 0: that one changes nothing.
    """

    slot: jax.Array
    token: jax.Array
    length: jax.Array
    number: jax.Array

    @classmethod
    def create(cls, slots: jax.Array, tokens: jax.Array, strip_rows: int) -> Runs:
        """From the token that goes to each slot; slots -1 are left out."""
        valid = slots >= 0
        follows = (slots[1:] == slots[:-1] + 1) & (tokens[1:] == tokens[:-1] + 1) & valid[:-1]
        follows = jnp.insert(follows, 0, False) & (slots % strip_rows != 0)
        index = jnp.arange(slots.size, dtype=jnp.int32)
        breaks = jnp.where(valid & follows, slots.size, index)
        next_break = jnp.append(lax.cummin(breaks, reverse=True)[1:], slots.size)
        starts = valid & ~follows
        order = jnp.argsort(jnp.where(starts, slots, jnp.iinfo(jnp.int32).max))
        length = jnp.where(starts, next_break - index, 0)[order]
        number = jnp.maximum(jnp.sum(starts, dtype=jnp.int32), 1)
        return cls(jnp.maximum(slots[order], 0), tokens[order], length, number)

    def part(self, first: int, most: int) -> Runs:
        """Runs ``first`` to ``first + most``; where there are none, one of length 0."""
        slot, token, length = (field[first : first + most] for field in self[:3])
        return Runs(slot, token, length, jnp.clip(self.number - first, 1, most))


@partial(jax.jit, static_argnames=("kv_dtype", "tpu", "strip_rows"))
def _write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array | CompressedSlotMapping,
    k_scale: Any,
    v_scale: Any,
    *,
    kv_dtype: jnp.dtype,
    tpu: Tpu,
    strip_rows: int,
) -> tuple[jax.Array, jax.Array]:
    num_pages, kv_heads, block_size, _ = k_pages.shape
    slots, tokens = slots_and_tokens(slot_mapping, k.shape[0])
    tokens = jnp.arange(k.shape[0], dtype=jnp.int32) if tokens is None else tokens
    report_out_of_range("slot_mapping", slots, num_pages * block_size)
    page = slots // block_size
    slots = jnp.where((page >= 0) & (page < num_pages), slots, -1)
    runs = Runs.create(slots, tokens, strip_rows)
    k_rows, v_rows = (_by_head(x, pages.shape[3], strip_rows) for x, pages in ((k, k_pages), (v, v_pages)))
    scales = jnp.stack([jnp.broadcast_to(1.0 if s is None else per_head(s), kv_heads) for s in (k_scale, v_scale)])
    scaled = (k_scale is not None, v_scale is not None)
    kernel = partial(_kernel, widths=(k.shape[2], v.shape[2]), scaled=scaled, kv_dtype=kv_dtype)
    for first in range(0, slots.size, MAX_RUNS):
        part = runs.part(first, MAX_RUNS)
        k_pages, v_pages = _write_runs(kernel, part, scales, k_rows, v_rows, k_pages, v_pages, strip_rows, tpu)
    return k_pages, v_pages


def _write_runs(
    kernel: Any,
    runs: Runs,
    scales: jax.Array,
    k_rows: jax.Array,
    v_rows: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    rows: int,
    tpu: Tpu,
) -> tuple[jax.Array, jax.Array]:
    """One call: as many runs as have room in scalar memory."""
    _, kv_heads, block_size, k_width = k_pages.shape
    v_width = v_pages.shape[3]

    def strip(width: int) -> pl.BlockSpec:
        def place(i: Any, slot: Any, *_: Any) -> tuple[Any, ...]:
            return slot[i] // block_size, 0, slot[i] % block_size // rows, 0

        return pl.BlockSpec((1, kv_heads, rows, width), place)

    def window(width: int, half: int) -> pl.BlockSpec:
        def place(i: Any, slot: Any, token: Any, *_: Any) -> tuple[Any, ...]:
            return 0, _window_start(slot[i], token[i], rows) // rows + half, 0

        return pl.BlockSpec((kv_heads, rows, width), place)

    return pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(runs.number,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *(window(k_width, half) for half in (0, 1)),
                *(window(v_width, half) for half in (0, 1)),
                strip(k_width),
                strip(v_width),
            ],
            out_specs=(strip(k_width), strip(v_width)),
        ),
        input_output_aliases={8: 0, 9: 1},
        compiler_params=compiler_params("arbitrary"),
        interpret=tpu.interpret,
        name="paged_write",
    )(runs.slot, runs.token, runs.length, scales, k_rows, k_rows, v_rows, v_rows, k_pages, v_pages)


def _by_head(values: jax.Array, width: int, rows: int) -> jax.Array:
    """[tokens, kv_heads, d] as [kv_heads, rows + tokens + padding, width]: heads first, with room at both ends."""
    tokens = values.shape[0]
    after = -tokens % rows + 2 * rows
    return jnp.pad(jnp.swapaxes(values, 0, 1), ((0, 0), (rows, after), (0, width - values.shape[2])))


def _window_start(slot: Any, token: Any, rows: int) -> Any:
    """The row of ``_by_head`` that belongs into the first row of the strip of a run."""
    return rows + token - slot % rows


def _kernel(
    slot: Any,
    token: Any,
    length: Any,
    scales: Any,
    k_low: Any,
    k_high: Any,
    v_low: Any,
    v_high: Any,
    k_old: Any,
    v_old: Any,
    k_new: Any,
    v_new: Any,
    *,
    widths: tuple[int, int],
    scaled: tuple[bool, bool],
    kv_dtype: jnp.dtype,
) -> None:
    """One run: slot, token, length i32[tokens], scales f32[2, kv_heads]; window halves [kv_heads, rows, width]; strips
    [1, kv_heads, rows, width], old as they were before the first run that changes them."""
    i = pl.program_id(0)
    _, kv_heads, rows, _ = k_old.shape
    first_row = slot[i] % rows
    shift = _window_start(slot[i], token[i], rows) % rows
    is_new_strip = (i == 0) | (slot[i] // rows != slot[jnp.maximum(i - 1, 0)] // rows)

    @pl.when(is_new_strip)
    def start_strip() -> None:
        k_new[...] = k_old[...]
        v_new[...] = v_old[...]

    @pl.loop(0, kv_heads)
    def write_head(head: Any) -> None:
        parts = ((k_low, k_high, k_new, widths[0]), (v_low, v_high, v_new, widths[1]))
        for part, (low, high, strip, width) in enumerate(parts):
            window = jnp.concatenate([low[head], high[head]]).astype(jnp.float32)
            values = pltpu.roll(window, 2 * rows - shift, 0)[:rows]
            if scaled[part]:  # a TPU divides by way of a reciprocal, which need not leave a number alone
                values = values / scales[part, head]
            row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            lane = lax.broadcasted_iota(jnp.int32, values.shape, 1)
            mine = (row >= first_row) & (row < first_row + length[i]) & (lane < width)
            strip[0, head] = jnp.where(mine, encode(values, strip.dtype, kv_dtype), strip[0, head])
