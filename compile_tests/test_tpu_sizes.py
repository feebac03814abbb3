"""Mosaic TPU forms of sizes beyond scalar memory, and with other parameters than by rule: compiled, without a copy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tune import SPACES
from compile_tests.tpu import TPUS, array, assert_in_place, assert_no_copy, compile_for, f32, i32, pool
from pallas_kernels import paged_attention, paged_copy, paged_gather, paged_write
from pallas_kernels.paged_attention.shapes import SHAPES
from pallas_kernels.tuning import forced

MOSAIC: dict[str, Any] = {"implementation": "mosaic_tpu"}
LLAMA = SHAPES["Llama-3-8B"]
SEQS, WIDTH = 256, 8192


@pytest.mark.parametrize(
    ("positions", "tpu"), [(False, tpu) for tpu in TPUS] + [(True, "v5e"), (True, "tpu7x")], ids=str
)
@pytest.mark.parametrize("tokens", [SEQS, 2048], ids=["decode", "ragged"])
def test_tables_of_8_mib_in_a_scan_over_layers(positions: bool, tokens: int, tpu: str) -> None:
    """256 sequences of up to 131072 tokens: eight times the scalar memory, and as much of positions."""
    pools = pool(LLAMA)
    blocks = pools[0].shape[0] // LLAMA.layers
    q = array((tokens, LLAMA.q_heads, LLAMA.head_dim), jnp.bfloat16)
    kv = array((tokens, LLAMA.kv_heads, LLAMA.head_dim), jnp.bfloat16)
    columns = i32(SEQS, WIDTH) if positions else None
    loc = None if tokens == SEQS else i32(SEQS + 1)

    def step(pools: Any, q: Any, kv: Any, slots: Any, tables: Any, columns: Any, lens: Any, loc: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            pools, x = carry
            pools = paged_write(*pools, kv, kv, jnp.where(slots >= 0, slots + index * blocks * 16, -1), **MOSAIC)
            here = jnp.where(tables >= 0, tables + index * blocks, -1)
            return (pools, paged_attention(x, *pools, here, lens, loc, block_positions=columns, **MOSAIC)), None

        return jax.lax.scan(layer, (pools, q), jnp.arange(LLAMA.layers, dtype=jnp.int32))[0]

    arguments = (pools, q, kv, i32(tokens), i32(SEQS, WIDTH), columns, i32(SEQS), loc)
    assert_in_place(compile_for(tpu, step, *arguments, donate=(0,)), pools)


@pytest.mark.parametrize("tpu", TPUS)
def test_tables_are_read_where_they_are(tpu: str) -> None:
    """Of whole tiles, and not changed for the layer: no copy of a table either."""
    q = array((SEQS, LLAMA.q_heads, LLAMA.head_dim), jnp.bfloat16)

    def attend(q: Any, pools: Any, tables: Any, lens: Any) -> Any:
        return paged_attention(q, *pools, tables, lens, **MOSAIC)

    compiled = compile_for(tpu, attend, q, pool(LLAMA), i32(SEQS, WIDTH), i32(SEQS))
    assert compiled.memory_analysis().temp_size_in_bytes < SEQS * WIDTH * 4 // 2


@pytest.mark.parametrize("tpu", TPUS)
def test_as_many_sequences_as_have_room(tpu: str) -> None:
    """28 bytes of scalar memory each."""
    seqs = 2**15
    q = array((seqs, 8, 128), jnp.bfloat16)

    def attend(q: Any, pools: Any, tables: Any, lens: Any) -> Any:
        return paged_attention(q, *pools, tables, lens, **MOSAIC)

    assert_no_copy(compile_for(tpu, attend, q, pool(LLAMA), i32(seqs, 128), i32(seqs)))


@pytest.mark.parametrize("tpu", TPUS)
def test_lists_of_ids_beyond_scalar_memory(tpu: str) -> None:
    """2**18 of them to gather, 2**17 pairs to copy: 1 MiB each way."""
    pages = array((2**18, 1, 16, 128), jnp.bfloat16)
    assert_no_copy(compile_for(tpu, lambda pages, ids: paged_gather(pages, ids, **MOSAIC), pages, i32(2**18)))
    pairs = i32(2**17), i32(2**17)
    copied = compile_for(tpu, lambda pages, *pairs: paged_copy(pages, *pairs, **MOSAIC), pages, *pairs, donate=(0,))
    memory = copied.memory_analysis()
    assert memory.alias_size_in_bytes == pages.size * 2
    assert memory.temp_size_in_bytes < 2**17 * 16 * 128 * 2 + 2**24, "what is set aside, and no copy of the pool"


@pytest.mark.parametrize("tpu", ["v5e"])
def test_more_tokens_than_one_call_writes(tpu: str) -> None:
    pages, kv = array((2**18, 1, 16, 128), jnp.bfloat16), array((70_000, 1, 128), jnp.bfloat16)

    def write(pools: Any, kv: Any, slots: Any) -> Any:
        return paged_write(*pools, kv, kv, slots, **MOSAIC)

    assert_in_place(compile_for(tpu, write, (pages, pages), kv, i32(70_000), donate=(0,)), (pages, pages))


@pytest.mark.parametrize("tpu", ["v5e", "tpu7x"])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Gemma-2-9B"])
def test_the_largest_that_the_tuner_tries(name: str, tpu: str) -> None:
    """With everything else that takes memory. An entry that is right for one call is no trap for another."""
    shape = SHAPES[name]
    q = array((2048, shape.q_heads, shape.head_dim), jnp.bfloat16)

    def attend(q: Any, pools: Any, tables: Any, lens: Any, loc: Any, sinks: Any) -> Any:
        return paged_attention(q, *pools, tables, lens, loc, sinks=sinks, return_lse=True, **MOSAIC)

    largest = {
        name: max(values)
        for space in ("paged_attention decode", "paged_attention prefill")
        for name, values in SPACES[space].items()
        if name in ("decode_pages", "prefill_pages", "prefill_queries")
    }
    arguments = (q, pool(shape), i32(64, 128), i32(64), i32(65), f32(shape.q_heads))
    with forced("paged_attention", **largest):
        assert_no_copy(compile_for(tpu, attend, *arguments))


@pytest.mark.parametrize("tpu", TPUS)
def test_what_has_no_room_is_an_error_that_the_tuner_passes_over(tpu: str) -> None:
    q = array((SEQS, LLAMA.q_heads, LLAMA.head_dim), jnp.bfloat16)

    def attend(q: Any, pools: Any, tables: Any, lens: Any) -> Any:
        return paged_attention(q, *pools, tables, lens, **MOSAIC)

    with forced("paged_attention", decode_pages=2048), pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for(tpu, attend, q, pool(LLAMA), i32(SEQS, WIDTH), i32(SEQS))
