"""The Mosaic GPU form of attention compiled for an H100: every option, no copy of the pages, nothing spilled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from compile_tests.nvidia import compile_for, resources_of_mosaic
from compile_tests.test_nvidia_triton import NUM_PAGES, array, attention_arguments, num_bytes, pages_of
from pallas_kernels import paged_attention, paged_write
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape
from pallas_kernels.tuning import forced

MOSAIC: dict[str, Any] = {"implementation": "mosaic_gpu"}
SERVED = [name for name, shape in SHAPES.items() if shape.head_dim in mosaic_gpu.HEAD_DIMS]
LLAMA = SHAPES["Llama-3-8B"]


def attend(shape: AttentionShape, **options: Any) -> Any:
    """``paged_attention`` as a layer of that model would call it."""

    def call(q: Any, k: Any, v: Any, tables: Any, lens: Any, loc: Any, traced: dict[str, Any]) -> Any:
        given = {
            "scale": shape.scale,
            "sliding_window": shape.sliding_window,
            "chunk_size": shape.chunk_size,
            "logits_soft_cap": shape.logits_soft_cap,
            "sinks": jnp.zeros(shape.q_heads) if shape.has_sinks else None,
            **options,
            **traced,
        }
        if "rank" in given:
            given["context_parallel"] = (4, given.pop("rank"), 8)
        return paged_attention(q, k, v, tables, lens, loc, **given, return_lse=True, **MOSAIC)

    return call


@contextmanager
def dumped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, what the assembler says of each Mosaic kernel goes to ``folder``."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    yield
    monkeypatch.delenv("MOSAIC_GPU_DUMP_PTXAS")


@pytest.mark.parametrize("name", SERVED)
def test_no_register_is_spilled_and_no_page_copied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = pages_of(SHAPES[name])
    tokens = 2048 + 64 * SERVED.index(name)  # a kernel that was compiled before is not assembled, nor reported, again
    arguments = attention_arguments(SHAPES[name], pages, tokens=tokens, seqs=64)
    with dumped(tmp_path, monkeypatch):
        memory = compile_for("sm_90", attend(SHAPES[name]), *arguments, {}).memory_analysis()
    assert memory.temp_size_in_bytes < num_bytes(pages) / 8
    (kernel,) = resources_of_mosaic(tmp_path)
    assert kernel.name.startswith("paged_attention_prefill")
    assert kernel.spilled_bytes == 0


OPTIONS = {
    "window": {"sliding_window": array((), jnp.int32)},
    "chunk": {"chunk_size": array((), jnp.int32)},
    "soft-cap": {"logits_soft_cap": array((), jnp.float32)},
    "sinks": {"sinks": array((LLAMA.q_heads,), jnp.bfloat16)},
    "scales": {"scale": array((), jnp.float32), "k_scale": array((8,), jnp.float32), "v_scale": array((), jnp.float32)},
    "context": {"rank": array((), jnp.int32)},
    "positions": {"block_positions": array((64, 256), jnp.int32)},
}
EVERYTHING = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("traced", [{}, *OPTIONS.values(), EVERYTHING], ids=["none", *OPTIONS, "everything"])
def test_every_option(traced: dict[str, Any]) -> None:
    arguments = attention_arguments(LLAMA, pages_of(LLAMA), tokens=2048, seqs=64)
    compile_for("sm_90", attend(LLAMA, causal=bool(traced)), *arguments, traced)


@pytest.mark.parametrize("head_dim", mosaic_gpu.HEAD_DIMS)
@pytest.mark.parametrize("block_size", [8, 32, 64, 128, 256])
def test_every_block_size(block_size: int, head_dim: int) -> None:
    shape = AttentionShape(8, 2, head_dim, 1)
    pages = pages_of(shape, block_size=block_size)
    compile_for("sm_90", attend(shape), *attention_arguments(shape, pages, tokens=512, seqs=8), {})


@pytest.mark.parametrize("tokens", [33, 65, 100, 2050])
def test_any_number_of_tokens(tokens: int) -> None:
    compile_for("sm_90", attend(LLAMA), *attention_arguments(LLAMA, pages_of(LLAMA), tokens=tokens, seqs=16), {})


def test_small_blocks_spill_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = pages_of(LLAMA, block_size=8)
    with dumped(tmp_path, monkeypatch):
        compile_for("sm_90", attend(LLAMA), *attention_arguments(LLAMA, pages, tokens=1984, seqs=64), {})
    (kernel,) = resources_of_mosaic(tmp_path)
    assert kernel.spilled_bytes == 0


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("take_turns", [0, 1])
def test_what_the_tuner_tries(take_turns: int, stages: int) -> None:
    """In either order; as many stages as shared memory has room for, and what is beyond does not compile."""
    arguments = attention_arguments(LLAMA, pages_of(LLAMA), tokens=2048, seqs=64)
    with forced("paged_attention", prefill_stages=stages, take_turns=take_turns):
        if stages == 2:
            compile_for("sm_90", attend(LLAMA), *arguments, {})
        else:
            with pytest.raises(Exception, match=r"(?i)shared memory|smem"):
                compile_for("sm_90", attend(LLAMA), *arguments, {})


@pytest.mark.parametrize("keys", [32, 64])
def test_steps_smaller_than_a_warpgroup_are_refused(keys: int) -> None:
    arguments = attention_arguments(LLAMA, pages_of(LLAMA), tokens=2048, seqs=64)
    refused = pytest.raises(NotImplementedError, match=f"{keys} keys a step")
    with forced("paged_attention", prefill_keys=keys), refused:
        compile_for("sm_90", attend(LLAMA), *arguments, {})


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 128), (128, 64)])
def test_values_of_another_size(head_dim: int, v_head_dim: int) -> None:
    pages = pages_of(AttentionShape(8, 2, 128, 1))
    arguments = attention_arguments(AttentionShape(8, 2, head_dim, 1), pages, tokens=512, seqs=8)
    compile_for("sm_90", attend(AttentionShape(8, 2, head_dim, 1), v_head_dim=v_head_dim), *arguments, {})


@pytest.mark.parametrize(("storage", "dtype"), [(jnp.uint16, jnp.bfloat16), (jnp.float16, jnp.float16)], ids=str)
def test_formats(storage: Any, dtype: Any) -> None:
    arguments = attention_arguments(LLAMA, pages_of(LLAMA, storage), tokens=2048, seqs=64, dtype=dtype)
    compile_for("sm_90", attend(LLAMA, kv_dtype=dtype), *arguments, {})


def test_a_scan_over_layers_carries_the_pages_in_place() -> None:
    """Write and attend in every layer of a scan; K and V are one buffer each from end to end."""
    layers, per_layer, tokens = 4, NUM_PAGES // 4, 2048
    pages = pages_of(LLAMA)
    q, _, _, tables, lens, loc = attention_arguments(LLAMA, pages, tokens=tokens, seqs=64)
    token = array((layers, tokens, LLAMA.kv_heads, LLAMA.head_dim), jnp.bfloat16)

    def model(pages: Any, q: Any, kv: Any, slots: Any, tables: Any, lens: Any, loc: Any) -> Any:
        def layer(carry: Any, inputs: Any) -> Any:
            pages, q = carry
            index, k, v = inputs
            first = index * per_layer
            pages = paged_write(*pages, k, v, slots + first * pages[0].shape[2], implementation="triton")
            return (pages, paged_attention(q, *pages, tables + first, lens, loc, **MOSAIC)), None

        return jax.lax.scan(layer, (pages, q), (jnp.arange(layers), *kv))

    slots = array((tokens,), jnp.int32)
    arguments = ((pages, pages), q, (token, token), slots, tables, lens, loc)
    memory = compile_for("sm_90", model, *arguments, donate=(0,)).memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes(pages, pages)
    assert memory.temp_size_in_bytes < num_bytes(pages) / 8
