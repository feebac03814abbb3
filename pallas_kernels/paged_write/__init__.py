"""Tokens' K and V, written into their slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import (
    require_array,
    require_int32,
    require_pages,
    require_positive_int,
    require_scale,
    require_shape,
    same_dtype,
)
from pallas_kernels.compressed_slots import CompressedSlotMapping
from pallas_kernels.dispatch import Implementation, Operation
from pallas_kernels.errors import require
from pallas_kernels.number_format import logical_dtype

_OPERATION = Operation(
    "paged_write",
    {
        "triton": "pallas_kernels.paged_write.triton",
        "mosaic_tpu": "pallas_kernels.paged_write.mosaic_tpu",
        "xla": "pallas_kernels.paged_write.reference",
    },
)


def paged_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array | CompressedSlotMapping,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Write the K and V of T tokens into their slots; quantise on the way in.

    ``slot = page * block_size + offset``. In place when the pages are donated to the ``jit`` around it.

    Args:
        k_pages: [pages, kv_heads, block_size, Dk], of ``kv_dtype``, or of unsigned bits as wide as it.
        v_pages: [pages, kv_heads, block_size, Dv], of the same dtype.
        k: floating [T, kv_heads, dk], dk <= Dk; what Dk has beyond dk is left as it was.
        v: floating [T, kv_heads, dv], dv <= Dv.
        slot_mapping: i32[T], the slot of each token, -1: dropped; or runs i32[n, 3] of (first_slot,
            first_token, length): tokens first_token, +1, ... go to slots first_slot, +1, ...; length 0 or
            first_slot -1 is padding, and the lengths add up to T at most; or a ``CompressedSlotMapping`` of at
            most T tokens, whose blocks are one page each or several. Slots must be distinct; of equal ones any
            wins, or each in part.
        k_scale: None (1), or a traced scale [] or [kv_heads]: what is stored is ``k / k_scale``.
        v_scale: likewise for v.
        kv_dtype: logical dtype of the pages: float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2.
            None: the dtype of the pages. int8 is rounded half to even and saturated; fp8 is saturated.
        implementation: a form, a sequence of forms to try in turn, or None for the best possible here.

    Returns:
        (k_pages, v_pages) after the write. A slot outside the pool is dropped; in ``checking()`` it is a
        ``checkify`` error.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        NotImplementedError: no form asked for can run here.
    """
    require_pages("k_pages", k_pages)
    require_pages("v_pages", v_pages)
    require_shape("v_pages", v_pages, (*k_pages.shape[:3], v_pages.shape[3]), "k_pages but for head_dim")
    same_dtype("k_pages", k_pages, "v_pages", v_pages)
    logical = logical_dtype("k_pages", k_pages.dtype, kv_dtype)
    kv_heads = k_pages.shape[1]
    for name, values, pages in (("k", k, k_pages), ("v", v, v_pages)):
        want = f"floating [tokens, {kv_heads}, at most {pages.shape[3]}] = [tokens, kv_heads, head_dim]"
        require_array(name, values, want, 3)
        require(jnp.issubdtype(values.dtype, jnp.floating), name, values, want)
        require(values.shape[1] == kv_heads and 0 < values.shape[2] <= pages.shape[3], name, values, want)
    require(v.shape[0] == k.shape[0], "v", v, f"{k.shape[0]} tokens, as k")
    _require_mapping(slot_mapping, k.shape[0], k_pages.shape[2])
    require_scale("k_scale", k_scale, kv_heads)
    require_scale("v_scale", v_scale, kv_heads)
    return _OPERATION(
        implementation,
        k_pages,
        v_pages,
        k,
        v,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_dtype=logical,
    )


def _require_mapping(slot_mapping: Any, num_tokens: int, block_size: int) -> None:
    """Slots, runs or words for so many tokens and pages of ``block_size``."""
    if isinstance(slot_mapping, CompressedSlotMapping):
        require_int32("slot_mapping.words", slot_mapping.words, "int32[n]", 1)
        want = f"a positive multiple of the {block_size} tokens of a page"
        require_positive_int("slot_mapping.block_size", slot_mapping.block_size)
        fits = slot_mapping.block_size % block_size == 0
        require(fits, "slot_mapping.block_size", slot_mapping.block_size, want)
        return
    want = f"int32[{num_tokens}] (a slot a token) or int32[n, 3] (first_slot, first_token, length)"
    require_int32("slot_mapping", slot_mapping, want, (1, 2))
    fits = slot_mapping.shape == (num_tokens,) or (slot_mapping.ndim == 2 and slot_mapping.shape[1] == 3)
    require(fits, "slot_mapping", slot_mapping, want)
