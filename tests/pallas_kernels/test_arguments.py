"""Bad arguments: each is refused before anything runs, and the message names what came and what is wanted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    ArgumentError,
    CompressedSlotMapping,
    merge_attention_states,
    paged_attention,
    paged_copy,
    paged_gather,
    paged_write,
)


def _f(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def _i(*shape: int, dtype: Any = np.int32) -> Any:
    return np.zeros(shape, dtype)


ATTENTION: dict[str, Any] = {
    "q": _f(7, 4, 16),
    "k_pages": _f(6, 2, 8, 16),
    "v_pages": _f(6, 2, 8, 16),
    "block_tables": _i(3, 5),
    "kv_lens": _i(3),
    "query_start_loc": _i(4),
}
# argument(s) -> what the message must say
BAD_ATTENTION: list[tuple[dict[str, Any], str]] = [
    ({"q": _f(7, 64)}, r"q: got float32\[7, 64\], want floating \[tokens, q_heads, head_dim\]"),
    ({"q": _i(7, 4, 16)}, r"q: got int32\[7, 4, 16\], want floating"),
    ({"q": _f(7, 3, 16)}, r"q: got float32\[7, 3, 16\], want q_heads a multiple of kv_heads 2"),
    ({"q": _f(7, 0, 16)}, r"q: got .* want q_heads"),
    ({"q": _f(7, 4, 17)}, r"q: got float32\[7, 4, 17\], want head_dim 1 to 16"),
    ({"q": _f(7, 4, 0)}, r"q: got .* want head_dim 1 to 16"),
    ({"q": [1.0]}, r"q: got \[1.0\] \(list\), want an array"),
    ({"q": None}, r"q: got None \(NoneType\), want an array"),
    ({"k_pages": _f(6, 2, 8)}, r"k_pages: got float32\[6, 2, 8\], want \[pages, kv_heads"),
    ({"k_pages": _f(0, 2, 8, 16)}, r"k_pages: got .* no dimension 0"),
    ({"v_pages": _f(5, 2, 8, 16)}, r"v_pages: got float32\[5, 2, 8, 16\], want shape \[6, 2, 8, 16\]"),
    ({"v_pages": _f(6, 2, 4, 16)}, r"v_pages: got float32\[6, 2, 4, 16\], want shape \[6, 2, 8, 16\]"),
    ({"v_pages": _f(6, 2, 8, 16, dtype=np.float16)}, r"v_pages: got float16.*, want the dtype of k_pages, float32"),
    ({"k_pages": _i(6, 2, 8, 16), "v_pages": _i(6, 2, 8, 16)}, r"k_pages: got pages of int32, want kv_dtype given"),
    (
        {"k_pages": _i(6, 2, 8, 16, dtype=np.uint8), "v_pages": _i(6, 2, 8, 16, dtype=np.uint8)},
        r"k_pages: got pages of uint8, want kv_dtype given",
    ),
    ({"kv_dtype": "bfloat16"}, r"k_pages: got pages of float32 for kv_dtype bfloat16, want bfloat16 or uint16"),
    ({"kv_dtype": "int4"}, r"kv_dtype: got 'int4' .*want one of"),
    ({"kv_dtype": "nonsense"}, r"kv_dtype: got 'nonsense' .*want one of"),
    ({"block_tables": _i(3, 5, dtype=np.int64)}, r"block_tables: got int64\[3, 5\], want int32\[seqs, width\]"),
    ({"block_tables": _i(15)}, r"block_tables: got int32\[15\], want int32\[seqs, width\]"),
    ({"block_tables": _i(3, 0)}, r"block_tables: got int32\[3, 0\], want a width of at least 1"),
    ({"kv_lens": _i(4)}, r"kv_lens: got int32\[4\], want shape \[3\]"),
    ({"kv_lens": _f(3)}, r"kv_lens: got float32\[3\], want int32"),
    ({"query_start_loc": _i(3)}, r"query_start_loc: got int32\[3\], want shape \[4\]"),
    ({"query_start_loc": _f(4)}, r"query_start_loc: got float32\[4\], want int32"),
    ({"query_start_loc": None}, r"q: got float32\[7, 4, 16\], want 3 tokens, one a sequence"),
    ({"block_positions": _i(3, 4)}, r"block_positions: got int32\[3, 4\], want shape \[3, 5\]"),
    ({"block_positions": _f(3, 5)}, r"block_positions: got float32\[3, 5\], want int32"),
    ({"causal": 1}, r"causal: got 1 \(int\), want True or False"),
    ({"return_lse": None}, r"return_lse: got None"),
    ({"sliding_window": 0}, r"sliding_window: got 0 .*want an integer of at least 1"),
    ({"sliding_window": -1}, r"sliding_window: got -1"),
    ({"sliding_window": np.int32(0)}, r"sliding_window: got 0"),
    ({"sliding_window": 4.0}, r"sliding_window: got 4.0"),
    ({"sliding_window": True}, r"sliding_window: got True"),
    ({"sliding_window": _i(3)}, r"sliding_window: got int32\[3\], want an integer .* array of shape \[\]"),
    ({"chunk_size": 0}, r"chunk_size: got 0"),
    ({"chunk_size": _f()}, r"chunk_size: got float32\[\]"),
    ({"context_parallel": 2}, r"context_parallel: got 2 .*\(size, rank, interleave\)"),
    ({"context_parallel": (2, 0)}, r"context_parallel: got \(2, 0\)"),
    ({"context_parallel": (0, 0, 1)}, r"context_parallel size: got 0"),
    ({"context_parallel": (2, 2, 1)}, r"context_parallel rank: got 2 .*want 0 to 1"),
    ({"context_parallel": (2, -1, 1)}, r"context_parallel rank: got -1"),
    ({"context_parallel": (2, 0, 0)}, r"context_parallel interleave: got 0"),
    (
        {"context_parallel": (2, 0, 3), "block_positions": _i(3, 5)},
        r"context_parallel interleave: got 3 .*a divisor of block_size 8",
    ),
    ({"scale": "big"}, r"scale: got 'big'"),
    ({"scale": _f(2)}, r"scale: got float32\[2\]"),
    ({"logits_soft_cap": 0.0}, r"logits_soft_cap: got 0.0 .*above 0"),
    ({"logits_soft_cap": _i()}, r"logits_soft_cap: got int32\[\]"),
    ({"sinks": _f(3)}, r"sinks: got float32\[3\], want shape \[4\]"),
    ({"sinks": _i(4)}, r"sinks: got int32\[4\], want floating \[4\]"),
    ({"k_scale": _f(4)}, r"k_scale: got float32\[4\], want .*\[2\] = \[kv_heads\]"),
    ({"v_scale": _i(2)}, r"v_scale: got int32\[2\]"),
    ({"v_head_dim": 17}, r"v_head_dim: got 17 .*at most 16"),
    ({"v_head_dim": 0}, r"v_head_dim: got 0"),
    ({"max_query_len": 0}, r"max_query_len: got 0"),
    ({"max_kv_len": 1.5}, r"max_kv_len: got 1.5"),
]
WRITE: dict[str, Any] = {
    "k_pages": _f(6, 2, 8, 16),
    "v_pages": _f(6, 2, 8, 16),
    "k": _f(5, 2, 16),
    "v": _f(5, 2, 16),
    "slot_mapping": _i(5),
}
BAD_WRITE: list[tuple[dict[str, Any], str]] = [
    ({"k": _f(5, 3, 16)}, r"k: got float32\[5, 3, 16\], want floating \[tokens, 2, at most 16\]"),
    ({"v": _f(5, 2, 17)}, r"v: got float32\[5, 2, 17\], want floating \[tokens, 2, at most 16\]"),
    ({"v": _f(4, 2, 16)}, r"v: got float32\[4, 2, 16\], want 5 tokens"),
    ({"k": _i(5, 2, 16)}, r"k: got int32\[5, 2, 16\], want floating"),
    ({"slot_mapping": _i(4)}, r"slot_mapping: got int32\[4\], want int32\[5\]"),
    ({"slot_mapping": _i(5, 2)}, r"slot_mapping: got int32\[5, 2\], want int32\[5\] .* int32\[n, 3\]"),
    ({"slot_mapping": _i(5, dtype=np.int64)}, r"slot_mapping: got int64\[5\], want int32"),
    ({"slot_mapping": [0, 1, 2, 3, 4]}, r"slot_mapping: got \[0, 1, 2, 3, 4\] \(list\)"),
    ({"slot_mapping": CompressedSlotMapping(_i(4), 12)}, r"block_size: got 12 .* want a positive multiple of the 8"),
    ({"slot_mapping": CompressedSlotMapping(_i(4), 0)}, r"block_size: got 0 .* want at least 1"),
    ({"slot_mapping": CompressedSlotMapping(_i(4, 3), 8)}, r"slot_mapping.words: got int32\[4, 3\], want int32\[n\]"),
    ({"slot_mapping": CompressedSlotMapping(_f(4), 8)}, r"slot_mapping.words: got float32\[4\], want int32\[n\]"),
    ({"v_pages": _f(6, 2, 4, 16)}, r"v_pages: got float32\[6, 2, 4, 16\]"),
    ({"v_pages": _f(6, 2, 8, 16, dtype=np.float16)}, r"v_pages: got float16"),
    ({"k_pages": _f(2, 8, 16)}, r"k_pages: got float32\[2, 8, 16\]"),
    ({"kv_dtype": "float8_e4m3fn"}, r"pages of float32 for kv_dtype float8_e4m3fn, want float8_e4m3fn or uint8"),
    ({"k_scale": _f(3)}, r"k_scale: got float32\[3\]"),
    ({"v_scale": "x"}, r"v_scale: got 'x'"),
]
PAGES = _f(4, 2, 8, 16)
BAD_CALLS: list[tuple[Any, tuple[Any, ...], str]] = [
    (paged_gather, (PAGES, _i(3, 1)), r"ids: got int32\[3, 1\], want int32\[n\]"),
    (paged_gather, (PAGES, _f(3)), r"ids: got float32\[3\]"),
    (paged_gather, (PAGES[0], _i(3)), r"pages: got float32\[2, 8, 16\]"),
    (paged_copy, (PAGES, _i(3), _i(2)), r"dst: got int32\[2\], want shape \[3\]"),
    (paged_copy, (PAGES, _f(3), _i(3)), r"src: got float32\[3\]"),
    (paged_copy, ((), _i(3), _i(3)), r"pages: got \(\) .*at least one array"),
    (paged_copy, ([PAGES, PAGES[:2]], _i(3), _i(3)), r"pages: got float32\[2, 2, 8, 16\], want 4 pages"),
    (merge_attention_states, (_f(2, 3, 4), _f(2, 4)), r"lses: got float32\[2, 4\], want shape \[2, 3\]"),
    (merge_attention_states, (_f(2, 3, 4), _f(2, 3, 4)), r"lses: got float32\[2, 3, 4\]"),
    (merge_attention_states, (_f(0, 3, 4), _f(0, 3)), r"outs: got float32\[0, 3, 4\], want at least one state"),
    (merge_attention_states, (_i(2, 3, 4), _f(2, 3)), r"outs: got int32\[2, 3, 4\], want a floating dtype"),
    (merge_attention_states, (_f(2, 3), _f(2)), r"outs: got float32\[2, 3\]"),
]


def test_the_good_arguments_are_good() -> None:
    paged_attention(**ATTENTION)
    paged_write(**WRITE)


@pytest.mark.parametrize(("change", "message"), BAD_ATTENTION)
def test_attention(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        paged_attention(**{**ATTENTION, **change})


def test_bad_arguments_are_found_under_jit_and_are_value_errors() -> None:
    with pytest.raises(ValueError, match="kv_lens"):
        jax.jit(lambda kv_lens: paged_attention(**{**ATTENTION, "kv_lens": kv_lens}))(jnp.zeros(2, jnp.int32))


def test_latent_attention_is_reserved() -> None:
    with pytest.raises(NotImplementedError, match="MLA"):
        paged_attention(**{**ATTENTION, "v_pages": None})


@pytest.mark.parametrize(("change", "message"), BAD_WRITE)
def test_write(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        paged_write(**{**WRITE, **change})


@pytest.mark.parametrize(("call", "arguments", "message"), BAD_CALLS)
def test_other_calls(call: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(*arguments)
