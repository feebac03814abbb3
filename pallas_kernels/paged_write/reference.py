"""Write in XLA; runs anywhere; the definition of correct."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.checking import check
from pallas_kernels.compressed_slots import CompressedSlotMapping
from pallas_kernels.number_format import quantize
from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range


@partial(jax.jit, static_argnames="kv_dtype")
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
    """Scatter tokens into slots; see the public function."""
    slots, tokens = slots_and_tokens(slot_mapping, k.shape[0])
    if tokens is not None:
        k, v = k[tokens], v[tokens]
    num_pages, _, block_size, _ = k_pages.shape
    report_out_of_range("slot_mapping", slots, num_pages * block_size)
    # Floor division sends every negative slot to a negative page, so one test of the page finds all bad
    # slots.
    page, offset = nowhere_if_invalid(slots // block_size, num_pages), slots % block_size

    def write(pages: jax.Array, values: jax.Array, scale: Any) -> jax.Array:
        return scatter_tokens(pages, page, offset, quantize(values, scale, pages.dtype, kv_dtype))

    return write(k_pages, k, k_scale), write(v_pages, v, v_scale)


def slots_and_tokens(
    slot_mapping: jax.Array | CompressedSlotMapping, capacity: int
) -> tuple[jax.Array, jax.Array | None]:
    """Any form of mapping as (slots i32[capacity], tokens i32[capacity]); tokens None: each entry its own."""
    if isinstance(slot_mapping, CompressedSlotMapping):
        return slot_mapping.expand(capacity), None
    return expand_runs(slot_mapping, capacity) if slot_mapping.ndim == 2 else (slot_mapping, None)


def expand_runs(runs: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Runs i32[n, 3] of (first_slot, first_token, length) as (slots i32[capacity], tokens i32[capacity]).

    Entries past the runs' total length are slot -1. A run whose first slot is negative is padding.
    """
    if runs.shape[0] == 0:
        return jnp.full(capacity, -1, jnp.int32), jnp.zeros(capacity, jnp.int32)
    first_slot, first_token, length = jnp.where(runs[:, 2:] > 0, runs, jnp.array([-1, 0, 0], jnp.int32)).T
    report_run_errors(first_token, length, capacity)
    ends = jnp.cumsum(length)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    run = jnp.minimum(jnp.searchsorted(ends, entry, side="right"), runs.shape[0] - 1)
    step = entry - (ends[run] - length[run])
    token = first_token[run] + step
    valid = (entry < ends[-1]) & (first_slot[run] >= 0) & (token >= 0) & (token < capacity)
    return jnp.where(valid, first_slot[run] + step, -1), jnp.where(valid, token, 0)


def report_run_errors(first_token: jax.Array, length: jax.Array, capacity: int) -> None:
    """In checking mode, an error unless every run stays within the tokens, all together too."""
    inside = jnp.all((first_token >= 0) & (first_token + length <= capacity))
    check(inside, f"slot_mapping: got a run outside the {capacity} tokens, want it within")
    total = jnp.sum(length)
    message = f"slot_mapping: got runs of {{total}} tokens together, want {capacity} at most"
    check(total <= capacity, message, total=total)


def scatter_tokens(pages: jax.Array, page: jax.Array, offset: jax.Array, rows: jax.Array) -> jax.Array:
    """Put rows [T, kv_heads, d] at (page[t], :, offset[t], :d) of pages [pages, kv_heads, block_size, D]."""
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 2), scatter_dims_to_operand_dims=(0, 2)
    )
    indices = jnp.stack([page, offset], axis=-1)
    return lax.scatter(pages, indices, rows, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP)
