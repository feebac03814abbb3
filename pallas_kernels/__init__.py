"""Paged KV cache operations on plain arrays: gather, copy, write, attention, and the merge of its parts.

Useful alone: nothing here knows of block pools, tables as objects, or models. Pages are flat, one array for K
and one for V: ``[pages, kv_heads, block_size, head_dim]``; block b of layer l is page ``l * num_blocks + b``.
Padding is -1. Other ids out of range touch nothing outside the pool; in ``checking()`` they are ``checkify`` errors.
"""

from pallas_kernels.checking import checking
from pallas_kernels.compressed_slots import CompressedSlotMapping, compress_slots
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.errors import ArgumentError
from pallas_kernels.merge_attention_states import merge_attention_states
from pallas_kernels.page_layout import (
    from_heads_first,
    from_interleaved,
    from_nhd,
    to_heads_first,
    to_interleaved,
    to_nhd,
)
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_copy import paged_copy
from pallas_kernels.paged_gather import paged_gather
from pallas_kernels.paged_write import paged_write

__all__ = [
    "IMPLEMENTATIONS",
    "ArgumentError",
    "CompressedSlotMapping",
    "checking",
    "compress_slots",
    "from_heads_first",
    "from_interleaved",
    "from_nhd",
    "merge_attention_states",
    "paged_attention",
    "paged_copy",
    "paged_gather",
    "paged_write",
    "to_heads_first",
    "to_interleaved",
    "to_nhd",
]
