"""The Triton form of ``paged_attention``: interpreted on some of the shared cases, and on cases of its own.

Compiled, on a GPU, it runs all shared cases in ``test_paged_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paged_attention
from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.paged_attention import triton
from pallas_kernels.tuning import forced
from tests.pallas_kernels.attention_cases import CASES, AttentionCase
from tests.pallas_kernels.attention_inputs import make_inputs
from tests.pallas_kernels.form_checks import QUICKLY, SMALL_TILES, check_attention, check_nan
from tests.pallas_kernels.gpu import needs_gpu

MIXED: dict[str, Any] = {"kv_lens": (5, 33, 20, 64, 16), "query_lens": (5, 1, 20, 3, 1)}
LONG: dict[str, Any] = {"kv_lens": (700, 1300, 512), "query_lens": (1, 70, 9), "block_size": 16}

# What the shared table says with sizes that Triton has not (a head_dim of 10, say), said again with sizes it has.
MORE_CASES = [
    AttentionCase("triton-storage-padded", head_dim=16, storage_head_dim=40, v_storage_head_dim=24, **MIXED),
    AttentionCase("triton-v-head-dim-smaller", head_dim=32, v_head_dim=16, v_storage_head_dim=16, **MIXED),
    AttentionCase("triton-v-head-dim-larger", head_dim=16, v_head_dim=48, v_storage_head_dim=48, **MIXED),
    AttentionCase("triton-group-of-5", q_heads=10, kv_heads=2, **MIXED),
    AttentionCase("triton-group-of-20", q_heads=20, kv_heads=1, **MIXED),
    AttentionCase("triton-decode-head-dim-80", head_dim=80, kv_lens=(1, 30, 77)),
    AttentionCase("triton-decode-splits-sinks", sinks=True, kv_lens=(0, 3, 150), num_padding_sequences=1),
    AttentionCase("triton-decode-splits-window", sliding_window=70, kv_lens=(9, 300, 150), block_size=16),
    AttentionCase("triton-decode-shuffled-splits", positions="shuffled", kv_lens=(9, 100, 150)),
    AttentionCase("triton-bfloat16", q_dtype="bfloat16", kv_dtype="bfloat16", head_dim=96, **MIXED),
    AttentionCase("triton-float16-from-fp8", q_dtype="float16", kv_dtype="float8_e5m2", stored_as="uint8", **MIXED),
    AttentionCase(
        "triton-everything",
        kv_dtype="float8_e4m3fn",
        stored_as="uint8",
        k_scale="head",
        v_scale="head",
        sinks=True,
        logits_soft_cap=2.0,
        sliding_window=50,
        chunk_size=400,
        context_parallel=(2, 1, 8),
        holes=((1, 5),),
        num_padding_tokens=5,
        num_padding_sequences=2,
        head_dim=16,
        storage_head_dim=32,
        v_storage_head_dim=32,
        **LONG,
    ),
]
ALL = {case.name: case for case in CASES + MORE_CASES}

# Each option once or twice, in decode and in mixed batches: a kernel takes seconds to trace for interpretation.
INTERPRETED = [
    *("decode", "decode-empty-sequences", "decode-long", "decode-padding-sequences", "only-padding"),
    *("prefill-two-tiles", "mixed", "mixed-long", "mixed-empty-queries", "mixed-padding-tokens", "speculative"),
    *("ragged-single-queries", "more-queries-than-keys", "no-spare-column", "block-size-1", "block-size-128"),
    *("heads-14q2kv", "head-dim-80", "not-causal-long", "window-7", "window-long-300", "window-decode-long"),
    *("chunk-12", "chunk-decode", "chunk-not-causal", "chunk-and-window", "holes", "holes-long", "shuffled-holes"),
    *("trimmed-window-long", "context-3-2-4", "context-decode", "context-sinks", "context-shuffled", "soft-cap"),
    *("sinks-decode", "k-scale-head", "large-logits", "int8-as-uint8-head-head", "bfloat16-as-uint16-None-None"),
    *("float8_e4m3fn-as-float8_e4m3fn-head-tensor", "q-float16", *(case.name for case in MORE_CASES)),
]


@pytest.fixture
def interpreted() -> Iterator[None]:
    with interpret_pallas(), forced("paged_attention", **SMALL_TILES):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", INTERPRETED)
def test_against_float64_interpreted(name: str) -> None:
    check_attention(triton.paged_attention, ALL[name])


@needs_gpu
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_against_float64_on_a_gpu(case: AttentionCase) -> None:
    check_attention(triton.paged_attention, case)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("programs_per_core", [1, 100])
def test_nan_interpreted(programs_per_core: int) -> None:
    with forced("paged_attention", programs_per_core=programs_per_core):
        check_nan(triton.paged_attention)


@needs_gpu
def test_nan_on_a_gpu() -> None:
    check_nan(triton.paged_attention)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("programs_per_core", [1, 5, 100])
def test_any_number_of_splits_gives_the_same(programs_per_core: int) -> None:
    with forced("paged_attention", programs_per_core=programs_per_core):
        check_attention(triton.paged_attention, ALL["triton-decode-splits-sinks"])


@pytest.mark.usefixtures("interpreted")
def test_traced_options_in_one_compiled_scan() -> None:
    """What varies by layer varies inside a scan, without a compilation each."""
    arguments = make_inputs(AttentionCase("traced", kv_lens=(33, 64), query_lens=(2, 20), k_scale="head")).arguments
    layers = {
        "sliding_window": np.array([3, 2**31 - 1], np.int32),
        "chunk_size": np.array([50, 9], np.int32),
        "rank": np.array([0, 1], np.int32),
        "k_scale": np.stack([arguments["k_scale"], arguments["k_scale"] * 2]),
        "v_scale": np.array([0.5, 2.0], np.float32),
        "scale": np.array([0.1, 0.2], np.float32),
        "logits_soft_cap": np.array([1.0, 5.0], np.float32),
    }

    def attend(layer: dict[str, Any], implementation: str) -> Any:
        layer = dict(layer)
        context = (2, layer.pop("rank"), 4)
        given = {**arguments, **layer, "context_parallel": context}
        return paged_attention(**given, return_lse=True, implementation=implementation)

    def scan(implementation: str) -> Any:
        body = lambda _, layer: (None, attend(layer, implementation))  # noqa: E731
        return jax.jit(lambda: jax.lax.scan(body, None, layers)[1], compiler_options=QUICKLY)()

    chex.assert_trees_all_close(scan("triton"), scan("xla"), atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_ids_outside_the_pool_are_as_minus_one() -> None:
    arguments = make_inputs(ALL["holes"]).arguments
    expected = paged_attention(**arguments, implementation="triton")
    table = arguments["block_tables"]
    for bad in (arguments["k_pages"].shape[0], 2**31 - 1, -(2**31)):
        given = {**arguments, "block_tables": np.where(table < 0, bad, table).astype(np.int32)}
        chex.assert_trees_all_equal(paged_attention(**given, implementation="triton"), expected)


def test_refuses_what_it_cannot_with_the_reason() -> None:
    arguments = make_inputs(ALL["decode"]).arguments
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs, and this program is for 'cpu'"):
        paged_attention(**arguments, implementation="triton")
    with interpret_pallas(pltpu.InterpretParams()), pytest.raises(NotImplementedError, match="interpret=True"):
        paged_attention(**arguments, implementation="triton")
    with interpret_pallas(), pytest.raises(NotImplementedError, match="head_dim 10"):
        paged_attention(**make_inputs(ALL["storage-padded"]).arguments, implementation="triton")


@needs_gpu
@pytest.mark.parametrize(
    ("stored", "kv_dtype", "elements"),
    [
        ("bfloat16", None, 2**31),
        ("float8_e4m3fn", None, 2**31),
        ("uint8", "float8_e5m2", 2**31),
        ("int8", None, 3 * 2**30),
        ("float8_e4m3fn", None, 2**32),
    ],
)
def test_pool_of_more_than_2_to_31_elements(stored: str, kv_dtype: str | None, elements: int) -> None:
    """The last pages of a large pool, against the same pages alone; a mixed batch, decode and prefill."""
    given = dict(make_inputs(ALL["triton-bfloat16"]).arguments)
    small = {name: _stored(given[name], stored, kv_dtype) for name in ("k_pages", "v_pages")}
    given["kv_dtype"] = kv_dtype
    expected = paged_attention(**{**given, **small}, implementation="triton")
    count, *page = small["k_pages"].shape
    first = elements // int(np.prod(page)) + 1
    place = jax.jit(lambda x: jnp.zeros((first + count, *x.shape[1:]), x.dtype).at[first:].set(x))
    table = given["block_tables"]
    given["block_tables"] = np.where(table >= 0, table + first, -1).astype(np.int32)
    got = paged_attention(**{**given, **jax.tree.map(place, small)}, implementation="triton")
    chex.assert_trees_all_close(got.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-2, rtol=1e-2)


def _stored(pages: Any, stored: str, kv_dtype: str | None) -> jax.Array:
    """Numbers as pages of ``stored``; NaN, the poison, as 0 where there is none."""
    numbers = jnp.asarray(pages, jnp.float32)
    if stored == "int8":
        return jnp.round(jnp.nan_to_num(numbers) * 20).astype(jnp.int8)
    numbers = numbers.astype(kv_dtype or stored)
    return numbers if kv_dtype is None else jax.lax.bitcast_convert_type(numbers, stored)
