"""Every Triton form at the named shapes, compiled for A100, H100 and B200: no copy of the pages, nothing spilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from compile_tests.nvidia import GPUS, SERVERS, compile_for, offset_widths, resources
from pallas_kernels import (
    CompressedSlotMapping,
    merge_attention_states,
    paged_attention,
    paged_copy,
    paged_gather,
    paged_write,
)
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape

TRITON: dict[str, Any] = {"implementation": "triton"}
NUM_PAGES, BLOCK_SIZE = 1 << 15, 16
FORMATS = {
    "bfloat16": (jnp.bfloat16, None),
    "float16-bits": (jnp.uint16, jnp.float16),
    "float32": (jnp.float32, None),
    "int8": (jnp.int8, None),
    "e4m3-bits": (jnp.uint8, jnp.float8_e4m3fn),
    "e5m2": (jnp.float8_e5m2, None),
}
ONE_BYTE = ["int8", "e4m3-bits", "e5m2"]
# Of one byte each, so many elements that 31 bits do not reach the last, and so few that Triton gets no offsets of 64.
LARGE = 3 * 2**30
# The shapes whose kernels may not spill a register.
UNSPILLED = ["Llama-3-8B", "Qwen3-0.6B", "Qwen3-4B", "Qwen3-32B"]

array = jax.ShapeDtypeStruct


def pages_of(shape: AttentionShape, dtype: Any = jnp.bfloat16, block_size: int = BLOCK_SIZE) -> Any:
    return array((NUM_PAGES, shape.kv_heads, block_size, shape.head_dim), dtype)


def large_pages_of(shape: AttentionShape, dtype: Any) -> Any:
    return array((LARGE // (shape.kv_heads * BLOCK_SIZE * shape.head_dim), *pages_of(shape).shape[1:]), dtype)


def num_bytes(*arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def attention_arguments(shape: AttentionShape, pages: Any, *, tokens: int, seqs: int, dtype: Any = jnp.bfloat16) -> Any:
    q = array((tokens, shape.q_heads, shape.head_dim), dtype)
    tables, lens = array((seqs, 4096 // pages.shape[2]), jnp.int32), array((seqs,), jnp.int32)
    loc = array((seqs + 1,), jnp.int32) if tokens != seqs else None
    return q, pages, pages, tables, lens, loc


def attend(shape: AttentionShape, kv_dtype: Any = None) -> Any:
    """``paged_attention`` as a layer of that model would call it."""

    def call(q: Any, k: Any, v: Any, tables: Any, lens: Any, loc: Any, scales: Any = (None, None)) -> Any:
        return paged_attention(
            q,
            k,
            v,
            tables,
            lens,
            loc,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            chunk_size=shape.chunk_size,
            logits_soft_cap=shape.logits_soft_cap,
            sinks=jnp.zeros(shape.q_heads) if shape.has_sinks else None,
            k_scale=scales[0],
            v_scale=scales[1],
            kv_dtype=kv_dtype,
            return_lse=True,
            **TRITON,
        )

    return call


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("name", list(SHAPES))
def test_attention_of_a_mixed_batch(name: str, gpu: str) -> None:
    """Both kernels, decode and prefill; what they need beside the arguments and the result is little."""
    pages = pages_of(SHAPES[name])
    arguments = attention_arguments(SHAPES[name], pages, tokens=2048, seqs=64)
    memory = compile_for(gpu, attend(SHAPES[name]), *arguments).memory_analysis()
    assert memory.temp_size_in_bytes < num_bytes(pages) / 8


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("kv_format", list(FORMATS))
def test_attention_of_every_format(kv_format: str, gpu: str) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES["Llama-3-8B"]
    pages = pages_of(shape, storage)
    scales = array((), jnp.float32), array((shape.kv_heads,), jnp.float32)
    for tokens in (64, 2048):
        arguments = attention_arguments(shape, pages, tokens=tokens, seqs=64)
        memory = compile_for(gpu, attend(shape, kv_dtype), *arguments, scales).memory_analysis()
        assert memory.temp_size_in_bytes < num_bytes(pages) / 8


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("block_size", [8, 32, 64, 128, 256])
def test_attention_of_every_block_size(block_size: int, gpu: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    arguments = attention_arguments(shape, pages_of(shape, block_size=block_size), tokens=2048, seqs=64)
    compile_for(gpu, attend(shape), *arguments)


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_attention_in_float32(head_dim: int, gpu: str) -> None:
    shape = AttentionShape(8, 2, head_dim, 1)
    pages = pages_of(shape, jnp.float32)
    compile_for(gpu, attend(shape), *attention_arguments(shape, pages, tokens=256, seqs=8, dtype=jnp.float32))


# Dtypes of q and of the pages, heads of a group, queries of a sequence.
WIDEST = [
    ("bfloat16", "bfloat16", 4, 256),
    ("float32", "float32", 4, 256),
    ("bfloat16", "int8", 4, 256),
    ("float32", "int8", 4, 256),
    ("bfloat16", "bfloat16", 16, 4),
    ("float32", "float32", 16, 4),
    ("bfloat16", "bfloat16", 128, 1),
    ("float32", "float32", 128, 1),
]


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("head_dim", [256, 384, 512])
@pytest.mark.parametrize(("q_dtype", "kv_dtype", "group", "queries"), WIDEST)
def test_a_tile_has_room_in_shared_memory_or_is_refused(
    q_dtype: str, kv_dtype: str, group: int, queries: int, head_dim: int, gpu: str
) -> None:
    """Refused while it is traced: then another form serves. An error of the compiler nobody catches."""
    shape = AttentionShape(2 * group, 2, head_dim, 1)
    arguments = attention_arguments(
        shape, pages_of(shape, kv_dtype), tokens=8 * queries, seqs=8, dtype=jnp.dtype(q_dtype)
    )

    def call(q: Any, k: Any, v: Any, tables: Any, lens: Any, loc: Any) -> Any:
        return paged_attention(q, k, v, tables, lens, loc, max_query_len=queries, **TRITON)

    try:
        compile_for(gpu, call, *arguments)
    except NotImplementedError as reason:
        refused = str(reason)
    else:
        return
    assert "bytes of shared memory, of which a program on" in refused
    # What many rows of one sequence share is one tile; others can be made smaller.
    assert group * queries in (64, 128)
    assert (head_dim, q_dtype) != (256, "bfloat16")


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32", "BF16_BF16_F32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_are_not_those_of_the_configuration(dtype: str, precision: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    arguments = attention_arguments(shape, pages_of(shape, dtype), tokens=256, seqs=8, dtype=jnp.dtype(dtype))
    programs = set()
    for configured in (None, precision):  # from one line, which stands in the program
        with jax.default_matmul_precision(configured):
            programs.add(compile_for("sm_90", attend(shape), *arguments).as_text())
    assert len(programs) == 1


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_attention_with_every_option(tokens: int, gpu: str) -> None:
    shape = SHAPES["Llama-3-8B"]
    pages = pages_of(shape, jnp.uint8)
    arguments = attention_arguments(shape, pages, tokens=tokens, seqs=64)
    traced = {
        "sliding_window": array((), jnp.int32),
        "chunk_size": array((), jnp.int32),
        "scale": array((), jnp.float32),
        "logits_soft_cap": array((), jnp.float32),
        "sinks": array((shape.q_heads,), jnp.bfloat16),
        "k_scale": array((), jnp.float32),
        "v_scale": array((shape.kv_heads,), jnp.float32),
        "block_positions": arguments[3],
    }

    def call(arguments: Any, rank: Any, traced: Any) -> Any:
        return paged_attention(
            *arguments, context_parallel=(4, rank, 8), kv_dtype=jnp.float8_e4m3fn, return_lse=True, **traced, **TRITON
        )

    compile_for(gpu, call, arguments, array((), jnp.int32), traced)


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize(
    ("name", "kv_format"),
    [(UNSPILLED[0], kv_format) for kv_format in FORMATS]
    + [(name, kv_format) for name in UNSPILLED[1:] for kv_format in ("bfloat16", "e4m3-bits")],
)
def test_no_register_is_spilled(name: str, kv_format: str, gpu: str, tmp_path: Path) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES[name]
    for tokens in (64, 2048):
        dtype = jnp.float32 if storage == jnp.float32 else jnp.bfloat16
        arguments = attention_arguments(shape, pages_of(shape, storage), tokens=tokens, seqs=64, dtype=dtype)
        compile_for(gpu, attend(shape, kv_dtype), *arguments, dump=tmp_path / str(tokens))
        found = [kernel for kernel in resources(tmp_path / str(tokens), gpu) if kernel.name.startswith("paged_")]
        assert [kernel for kernel in found if kernel.spilled_bytes] == []
        assert len(found) == (1 if tokens == 64 else 2)


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("kv_format", ["bfloat16", "e4m3-bits"])
def test_no_register_is_spilled_where_columns_have_positions(kv_format: str, gpu: str, tmp_path: Path) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES["Llama-3-8B"]
    arguments = attention_arguments(shape, pages_of(shape, storage), tokens=2048, seqs=64)

    def call(arguments: Any, positions: Any) -> Any:
        given = {"block_positions": positions, "sliding_window": 1024, "kv_dtype": kv_dtype}
        return paged_attention(*arguments, **given, **TRITON)

    memory = compile_for(gpu, call, arguments, arguments[3], dump=tmp_path).memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 20
    found = [kernel for kernel in resources(tmp_path, gpu) if kernel.name.startswith("paged_")]
    assert len(found) == 2
    assert [kernel for kernel in found if kernel.spilled_bytes] == []


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("kv_format", list(FORMATS))
@pytest.mark.parametrize("name", ["Llama-3-8B", "Llama-3.2-1B", "StableLM-3B", "Phi-3-mini", "Gemma-3-1B"])
def test_write_is_in_place(name: str, kv_format: str, gpu: str, tmp_path: Path) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES[name]
    pages = pages_of(shape, storage)
    token = array((4096, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    scales = array((), jnp.float32), array((shape.kv_heads,), jnp.float32)

    def write(k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any, scales: Any) -> Any:
        return paged_write(
            k_pages, v_pages, k, v, slots, k_scale=scales[0], v_scale=scales[1], kv_dtype=kv_dtype, **TRITON
        )

    words = CompressedSlotMapping(array((512,), jnp.int32), BLOCK_SIZE)
    for form, mapping in enumerate((array((4096,), jnp.int32), array((64, 3), jnp.int32), words)):
        compiled = compile_for(
            gpu, write, pages, pages, token, token, mapping, scales, donate=(0, 1), dump=tmp_path / str(form)
        )
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == num_bytes(pages, pages)
        assert memory.temp_size_in_bytes < 1 << 20
    assert not any(kernel.spilled_bytes for kernel in resources(tmp_path / "0", gpu))


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("kv_format", ONE_BYTE)
def test_attention_over_2_to_4_gib_of_bytes(kv_format: str, gpu: str, tmp_path: Path) -> None:
    """Read two by two: no copy, nothing spilled, and every address is its page's base and a 64-bit number of bytes."""
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES["Llama-3-8B"]
    pages = large_pages_of(shape, storage)
    for tokens in (64, 2048):
        dump = tmp_path / str(tokens)
        arguments = attention_arguments(shape, pages, tokens=tokens, seqs=64)
        memory = compile_for(gpu, attend(shape, kv_dtype), *arguments, dump=dump).memory_analysis()
        assert memory.temp_size_in_bytes < num_bytes(pages) / 256
        found = [kernel for kernel in resources(dump, gpu) if kernel.name.startswith("paged_")]
        assert [kernel for kernel in found if kernel.spilled_bytes] == []
        for kernel in found:
            for k_or_v in (1, 2):
                assert offset_widths(dump, kernel.name, k_or_v) == {2}


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("kv_format", ONE_BYTE)
def test_write_into_2_to_4_gib_of_bytes(kv_format: str, gpu: str, tmp_path: Path) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    shape = SHAPES["Llama-3-8B"]
    pages = large_pages_of(shape, storage)
    token = array((4096, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    write = lambda *x: paged_write(*x, kv_dtype=kv_dtype, **TRITON)  # noqa: E731
    slots = array((4096,), jnp.int32)
    compiled = compile_for(gpu, write, pages, pages, token, token, slots, donate=(0, 1), dump=tmp_path)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(pages, pages)
    assert memory.temp_size_in_bytes < 1 << 20
    (kernel,) = [kernel for kernel in resources(tmp_path, gpu) if kernel.name.startswith("paged_")]
    assert not kernel.spilled_bytes
    for k_or_v in (5, 6):
        assert offset_widths(tmp_path, kernel.name, k_or_v) == {2}


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["Llama-3-8B", "StableLM-3B", "Gemma-3-1B"])
def test_copy_and_gather(name: str, dtype: str, gpu: str) -> None:
    """Copy is in place; it sets aside no more than the pages that move, and a mark for each page."""
    pages = pages_of(SHAPES[name], jnp.dtype(dtype))
    ids = array((256,), jnp.int32)
    copied = compile_for(
        gpu, lambda pages, src, dst: paged_copy(pages, src, dst, **TRITON), (pages, pages), ids, ids, donate=(0,)
    ).memory_analysis()
    assert copied.alias_size_in_bytes == num_bytes(pages, pages)
    assert copied.temp_size_in_bytes < 2 * 256 * num_bytes(pages) // NUM_PAGES + 2 * NUM_PAGES + (1 << 16)
    gathered = compile_for(gpu, lambda pages, ids: paged_gather(pages, ids, **TRITON), pages, ids).memory_analysis()
    assert gathered.temp_size_in_bytes < 1 << 16


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_merge(head_dim: int, gpu: str) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        outs, lses = array((8, 64, 32, head_dim), dtype), array((8, 64, 32), jnp.float32)
        compile_for(gpu, lambda outs, lses: merge_attention_states(outs, lses, **TRITON), outs, lses)


@pytest.mark.parametrize("gpu", SERVERS)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_a_scan_over_layers_carries_the_pages_in_place(tokens: int, gpu: str) -> None:
    """Copy, write, attend and gather in every layer of a scan; K and V are one buffer each from end to end."""
    shape, layers, per_layer = SHAPES["Llama-3-8B"], 4, NUM_PAGES // 4
    pages = pages_of(shape)
    q, _, _, tables, lens, loc = attention_arguments(shape, pages, tokens=tokens, seqs=64)
    token = array((layers, tokens, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    ids = array((8,), jnp.int32)

    def model(pages: Any, q: Any, kv: Any, slots: Any, tables: Any, lens: Any, loc: Any, ids: Any) -> Any:
        def layer(carry: Any, inputs: Any) -> Any:
            pages, q = carry
            index, k, v = inputs
            first = index * per_layer
            pages = paged_copy(pages, ids + first, ids + first + 8, **TRITON)
            pages = paged_write(*pages, k, v, slots + first * BLOCK_SIZE, **TRITON)
            out = paged_attention(q, *pages, tables + first, lens, loc, **TRITON)
            return (pages, out), paged_gather(pages[0], ids + first, **TRITON)[:, 0, 0, 0]

        return jax.lax.scan(layer, (pages, q), (jnp.arange(layers), *kv))

    slots = array((tokens,), jnp.int32)
    arguments = ((pages, pages), q, (token, token), slots, tables, lens, loc, ids)
    memory = compile_for(gpu, model, *arguments, donate=(0,)).memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes(pages, pages)
    assert memory.temp_size_in_bytes < num_bytes(pages) / 8
