"""No operation copies the pool: read off the compiled program, for pools of 1 GiB that are never made."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import CompressedSlotMapping, paged_attention, paged_copy, paged_gather, paged_write

GIB = 2**30
# What a program may hold beside the pool: a few tiles and the activations of a step.
ALLOWANCE = 24 * 2**20
FORMATS = [("float32", None), ("uint16", "bfloat16"), ("uint8", "float8_e4m3fn"), ("int8", "int8")]
KV_HEADS, BLOCK_SIZE, HEAD_DIM, Q_HEADS = 8, 16, 128, 32


def _pool(dtype: str) -> jax.ShapeDtypeStruct:
    """1 GiB of pages."""
    page = KV_HEADS * BLOCK_SIZE * HEAD_DIM * jnp.dtype(dtype).itemsize
    return jax.ShapeDtypeStruct((GIB // page, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _memory(function: Any, *arguments: Any, donated: tuple[int, ...] = ()) -> Any:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile().memory_analysis()


def _assert_in_place(memory: Any, pools: int) -> None:
    assert memory.temp_size_in_bytes < ALLOWANCE
    assert memory.alias_size_in_bytes == pools * GIB


@pytest.mark.parametrize(("storage", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("mapping", [(64,), (8, 3)], ids=["slots", "runs"])
def test_write(storage: str, kv_dtype: str | None, mapping: tuple[int, ...]) -> None:
    new = _f32(64, KV_HEADS, HEAD_DIM)
    write = partial(paged_write, kv_dtype=kv_dtype, k_scale=0.5, v_scale=0.5)
    memory = _memory(write, _pool(storage), _pool(storage), new, new, _i32(*mapping), donated=(0, 1))
    _assert_in_place(memory, 2)


def test_write_of_words() -> None:
    new, words = _f32(64, KV_HEADS, HEAD_DIM), CompressedSlotMapping(_i32(8), BLOCK_SIZE)
    _assert_in_place(_memory(paged_write, _pool("float32"), _pool("float32"), new, new, words, donated=(0, 1)), 2)


@pytest.mark.parametrize("storage", [storage for storage, _ in FORMATS])
def test_copy(storage: str) -> None:
    pools = (_pool(storage), _pool(storage))
    _assert_in_place(_memory(paged_copy, pools, _i32(32), _i32(32), donated=(0,)), 2)


def test_gather() -> None:
    memory = _memory(paged_gather, _pool("float32"), _i32(32))
    assert memory.temp_size_in_bytes < ALLOWANCE


@pytest.mark.parametrize(("storage", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("ragged", [False, True], ids=["decode", "ragged"])
def test_attention(storage: str, kv_dtype: str | None, ragged: bool) -> None:
    seqs, tokens = 16, 128 if ragged else 16
    attend = partial(paged_attention, kv_dtype=kv_dtype, return_lse=True)
    arguments = [_f32(tokens, Q_HEADS, HEAD_DIM), _pool(storage), _pool(storage), _i32(seqs, 512), _i32(seqs)]
    memory = _memory(attend, *arguments, *([_i32(seqs + 1)] if ragged else []))
    assert memory.temp_size_in_bytes < ALLOWANCE


@pytest.mark.parametrize(("storage", "kv_dtype"), FORMATS)
def test_write_and_attend_in_a_scan_over_layers(storage: str, kv_dtype: str | None) -> None:
    """The shape of a model's step: pages as carry, written and read in the body, page ids by layer."""
    layers, seqs, width = 8, 16, 512
    num_blocks = _pool(storage).shape[0] // layers

    def step(k_pages: Any, v_pages: Any, q: Any, kv: Any, tables: Any, lens: Any, slots: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            x, k_pages, v_pages = carry
            offset = index * num_blocks
            at = jnp.where(slots >= 0, slots + offset * BLOCK_SIZE, -1)
            k_pages, v_pages = paged_write(k_pages, v_pages, kv, kv + x[:, :KV_HEADS], at, kv_dtype=kv_dtype)
            pages = jnp.where(tables >= 0, tables + offset, -1)
            x = x + paged_attention(x, k_pages, v_pages, pages, lens, kv_dtype=kv_dtype, sliding_window=index + 1)
            return (x, k_pages, v_pages), None

        return jax.lax.scan(layer, (q, k_pages, v_pages), jnp.arange(layers))[0]

    activations = _f32(seqs, Q_HEADS, HEAD_DIM), _f32(seqs, KV_HEADS, HEAD_DIM)
    tables = _i32(seqs, width), _i32(seqs), _i32(seqs)
    _assert_in_place(_memory(step, _pool(storage), _pool(storage), *activations, *tables, donated=(0, 1)), 2)


def test_attention_memory_goes_by_tokens_not_by_sequences_times_longest() -> None:
    """256 sequences that may have 512 queries, but 512 tokens in all."""
    seqs, tokens = 256, 512
    attend = partial(paged_attention, max_query_len=512, return_lse=True)
    arguments = [_f32(tokens, Q_HEADS, HEAD_DIM), _pool("float32"), _pool("float32")]
    memory = _memory(attend, *arguments, _i32(seqs, 64), _i32(seqs), _i32(seqs + 1))
    activation = tokens * Q_HEADS * HEAD_DIM * 4
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 8 * activation + ALLOWANCE
