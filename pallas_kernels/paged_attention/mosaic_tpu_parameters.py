"""How the TPU attention kernel is cut: from the tuning table, or by rule where it is silent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.mosaic_tpu import require_parameters
from pallas_kernels.tpu import Tpu
from pallas_kernels.tuning import next_power_of_2, parameters

MAX_ROWS = 512
MAX_ROWS_OF_ALL_HEADS = 4096
KEYS_A_STEP = 512
PAGE_BUFFER_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Steps and tiles for short (decode) and long (prefill) sequences.

    Attributes:
        decode_pages, prefill_pages: read at a time.
        prefill_queries: of a tile; decode takes as few as hold a sequence.
    """

    decode_pages: int
    prefill_pages: int
    prefill_queries: int


def choose_parameters(tpu: Tpu, q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, kv_dtype: Any) -> Parameters:
    """For these shapes on this TPU.

    Raises:
        ValueError: the table's are less than 1.
    """
    _, kv_heads, block_size, _ = k_pages.shape
    group = q.shape[1] // kv_heads
    shape = {
        "kv_heads": kv_heads,
        "group": group,
        "head_dim": q.shape[2],
        "block_size": block_size,
        "itemsize": kv_dtype.itemsize,
        "q_itemsize": q.dtype.itemsize,
    }
    page_bytes = kv_heads * block_size * (k_pages.shape[3] + v_pages.shape[3]) * k_pages.dtype.itemsize
    rule = heuristic(kv_heads, group, block_size, page_bytes)
    chosen = parameters("paged_attention", "mosaic_tpu", tpu.kind, shape, rule)
    require_parameters("paged_attention", chosen, min(chosen.values()) >= 1, "at least 1 of each")
    return Parameters(**chosen)


def heuristic(kv_heads: int, group: int, block_size: int, page_bytes: int) -> dict[str, int]:
    """Products of some 512 rows by 512 keys, within PAGE_BUFFER_BYTES for both buffers of K and V.

    ``page_bytes``: of a page of K and one of V.
    """
    pages = max(min(KEYS_A_STEP // block_size, PAGE_BUFFER_BYTES // (2 * page_bytes)), 1)
    rows = min(MAX_ROWS // group, MAX_ROWS_OF_ALL_HEADS // (group * kv_heads))
    queries = next_power_of_2(max(rows, 1) + 1) // 2
    return {"decode_pages": pages, "prefill_pages": pages, "prefill_queries": queries}
