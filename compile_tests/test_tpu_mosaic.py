"""Every Mosaic TPU form at the named shapes, compiled for v5e, v5p, v6e and tpu7x: no copy of the pages anywhere.

head_dim is stored padded to 128 lanes, as on a TPU it must be; q, k and v have the model's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from compile_tests.tpu import TPUS, array, assert_in_place, assert_no_copy, compile_for, f32, i32, pool
from pallas_kernels import (
    CompressedSlotMapping,
    merge_attention_states,
    paged_attention,
    paged_copy,
    paged_gather,
    paged_write,
)
from pallas_kernels.paged_attention.shapes import SHAPES

MOSAIC: dict[str, Any] = {"implementation": "mosaic_tpu"}
FORMATS = {
    "bfloat16": (jnp.bfloat16, None),
    "bfloat16-bits": (jnp.uint16, jnp.bfloat16),
    "float32": (jnp.float32, None),
    "int8": (jnp.int8, None),
    "int8-bits": (jnp.uint8, jnp.int8),
    "e4m3-bits": (jnp.uint8, jnp.float8_e4m3fn),
    "e5m2-bits": (jnp.uint8, jnp.float8_e5m2),
    "e4m3": (jnp.float8_e4m3fn, None),
}
TOKENS, SEQS, WIDTH = 256, 32, 128


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("name", SHAPES)
def test_write_and_mixed_attention_in_a_scan_over_layers(name: str, tpu: str) -> None:
    """The shape of a model's step: pages as carry, written and read in the body, page ids by layer."""
    shape, pools = SHAPES[name], pool(SHAPES[name])
    blocks = pools[0].shape[0] // shape.layers
    q = array((TOKENS, shape.q_heads, shape.head_dim), jnp.bfloat16)
    kv = array((TOKENS, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    sinks = f32(shape.q_heads) if shape.has_sinks else None

    def step(pools: Any, q: Any, kv: Any, slots: Any, tables: Any, lens: Any, loc: Any, sinks: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            pools, x = carry
            new_slots = jnp.where(slots >= 0, slots + index * blocks * 16, -1)
            pools = paged_write(*pools, kv, kv, new_slots, **MOSAIC)
            options = {"scale": shape.scale, "logits_soft_cap": shape.logits_soft_cap, "sinks": sinks}
            masks = {"sliding_window": shape.sliding_window, "chunk_size": shape.chunk_size}
            tables_here = jnp.where(tables >= 0, tables + index * blocks, -1)
            x = paged_attention(x, *pools, tables_here, lens, loc, **options, **masks, **MOSAIC)
            return (pools, x), None

        return jax.lax.scan(layer, (pools, q), jnp.arange(shape.layers, dtype=jnp.int32))[0]

    arguments = (pools, q, kv, i32(TOKENS), i32(SEQS, WIDTH), i32(SEQS), i32(SEQS + 1), sinks)
    assert_in_place(compile_for(tpu, step, *arguments, donate=(0,)), pools)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_write_and_decode(kind: str, tpu: str) -> None:
    """Also with scales per head and per tensor, the LSE, and head_dim 64 in pages padded to 128."""
    dtype, kv_dtype = FORMATS[kind]
    shape = SHAPES["Llama-3.2-1B"]
    pools = pool(shape, dtype)

    def step(pools: Any, q: Any, kv: Any, slots: Any, tables: Any, lens: Any, by_head: Any, scale: Any) -> Any:
        scales = {"k_scale": by_head, "v_scale": scale, "kv_dtype": kv_dtype}
        pools = paged_write(*pools, kv, kv, slots, **scales, **MOSAIC)
        return pools, paged_attention(q, *pools, tables, lens, return_lse=True, **scales, **MOSAIC)

    q = array((SEQS, shape.q_heads, shape.head_dim), jnp.bfloat16)
    kv = array((SEQS, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    arguments = (pools, q, kv, i32(SEQS), i32(SEQS, WIDTH), i32(SEQS), f32(shape.kv_heads), f32())
    assert_in_place(compile_for(tpu, step, *arguments, donate=(0,)), pools)


@pytest.mark.parametrize("tpu", ["v5e", "tpu7x"])
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 128, 256])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_block_sizes(kind: str, block_size: int, tpu: str) -> None:
    shape, dtype = SHAPES["Qwen3-0.6B"], FORMATS[kind][0]
    pools = pool(shape, dtype, block_size)

    def step(pools: Any, q: Any, kv: Any, slots: Any, tables: Any, lens: Any, loc: Any) -> Any:
        pools = paged_write(*pools, kv, kv, slots, **MOSAIC)
        return pools, paged_attention(q, *pools, tables, lens, loc, **MOSAIC)

    q = array((1024, shape.q_heads, shape.head_dim), jnp.bfloat16)
    kv = array((1024, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    arguments = (pools, q, kv, i32(1024), i32(4, WIDTH), i32(4), i32(5))
    assert_in_place(compile_for(tpu, step, *arguments, donate=(0,)), pools)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("ragged", [False, True], ids=["decode", "ragged"])
@pytest.mark.parametrize("positions", [False, True], ids=["in-order", "block-positions"])
def test_every_option_at_once(positions: bool, ragged: bool, tpu: str) -> None:
    shape = SHAPES["gpt-oss-20b"]
    tokens = TOKENS if ragged else SEQS
    traced = {
        "sliding_window": i32(),
        "chunk_size": i32(),
        "scale": f32(),
        "logits_soft_cap": f32(),
        "sinks": f32(shape.q_heads),
        "k_scale": f32(shape.kv_heads),
        "v_scale": f32(),
        "block_positions": i32(SEQS, WIDTH) if positions else None,
        "query_start_loc": i32(SEQS + 1) if ragged else None,
    }

    def attend(q: Any, pools: Any, tables: Any, lens: Any, rank: Any, traced: Any) -> Any:
        options: dict[str, Any] = {"context_parallel": (4, rank, 8), "return_lse": True, "max_kv_len": 4096}
        return paged_attention(q, *pools, tables, lens, **traced, **options, **MOSAIC)

    q = array((tokens, shape.q_heads, shape.head_dim), jnp.bfloat16)
    assert_no_copy(compile_for(tpu, attend, q, pool(shape), i32(SEQS, WIDTH), i32(SEQS), i32(), traced))


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("context", [32768, 131072])
def test_long_contexts(context: int, tpu: str) -> None:
    """32 sequences of 32768 tokens, or 8 of 131072, in blocks of 16."""
    shape, seqs = SHAPES["Llama-3-8B"], 2**20 // context
    q = array((seqs, shape.q_heads, shape.head_dim), jnp.bfloat16)

    def attend(q: Any, pools: Any, tables: Any, lens: Any) -> Any:
        return paged_attention(q, *pools, tables, lens, **MOSAIC)

    assert_no_copy(compile_for(tpu, attend, q, pool(shape), i32(seqs, context // 16), i32(seqs)))


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("kind", ["slots", "runs", "words"])
def test_write(kind: str, tpu: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    pools, kv = pool(shape), array((TOKENS, shape.kv_heads, shape.head_dim), jnp.float32)
    words = CompressedSlotMapping(i32(2 * SEQS), pools[0].shape[2])
    mapping = {"slots": i32(TOKENS), "runs": i32(SEQS, 3), "words": words}[kind]

    def write(pools: Any, kv: Any, slots: Any) -> Any:
        return paged_write(*pools, kv, kv, slots, **MOSAIC)

    assert_in_place(compile_for(tpu, write, pools, kv, mapping, donate=(0,)), pools)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8", "e4m3-bits", "e4m3"])
def test_copy_and_gather_in_a_scan_over_layers(kind: str, tpu: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    pools = pool(shape, FORMATS[kind][0])
    blocks = pools[0].shape[0] // shape.layers

    def move(pools: Any, src: Any, dst: Any) -> Any:
        def layer(pools: Any, index: Any) -> Any:
            pools = paged_copy(pools, src + index * blocks, dst + index * blocks, **MOSAIC)
            return pools, paged_gather(pools[0], dst[:2], **MOSAIC)

        return jax.lax.scan(layer, pools, jnp.arange(shape.layers, dtype=jnp.int32))

    assert_in_place(compile_for(tpu, move, pools, i32(64), i32(64), donate=(0,)), pools)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize(("states", "dtype"), [(2, jnp.bfloat16), (8, jnp.float32), (64, jnp.bfloat16)])
@pytest.mark.parametrize("name", ["Llama-3-8B", "StableLM-3B"])
def test_merge(name: str, states: int, dtype: Any, tpu: str) -> None:
    shape = SHAPES[name]
    outs = array((states, 100, shape.q_heads, shape.head_dim), dtype)
    compile_for(tpu, lambda outs, lses: merge_attention_states(outs, lses, **MOSAIC), outs, f32(*outs.shape[:-1]))


def test_pages_of_float16_are_moved_by_xla() -> None:
    pools = pool(SHAPES["Llama-3-8B"], jnp.float16)
    move = lambda pools, src, dst: (paged_copy(pools, src, dst), paged_gather(pools[0], dst))  # noqa: E731
    compile_for("v5e", move, pools, i32(64), i32(64), donate=(0,))


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32", "BF16_BF16_F32"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_products_are_not_those_of_the_configuration(name: str, precision: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    pools, q = pool(shape, FORMATS[name][0]), array((64, shape.q_heads, shape.head_dim), FORMATS[name][0])
    attend = lambda pools, q, *lens: paged_attention(q, *pools, *lens, **MOSAIC)  # noqa: E731
    with jax.default_matmul_precision(precision):
        compile_for("v5e", attend, pools, q, i32(64, 16), i32(64))


@pytest.mark.parametrize("shape", [(64, 8, 16, 64), (64, 8, 16, 80), (64, 8, 4, 128)])
def test_pages_that_a_call_would_copy_are_refused(shape: tuple[int, ...]) -> None:
    gather = lambda pages, ids: paged_gather(pages, ids, **MOSAIC)  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"would be copied whole by every call|no multiple of 8"):
        compile_for("v5e", gather, array(shape, jnp.bfloat16), i32(4))
