"""The Mosaic TPU form of ``paged_attention``, interpreted on some shared cases; ``compile_tests`` runs them all."""

from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np
import pytest

from pallas_kernels import paged_attention
from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.paged_attention import mosaic_tpu
from pallas_kernels.tuning import forced
from tests.pallas_kernels.attention_cases import CASES, AttentionCase
from tests.pallas_kernels.attention_inputs import make_inputs
from tests.pallas_kernels.form_checks import QUICKLY
from tests.pallas_kernels.mosaic_checks import STRICT, check_attention, check_nan, interpreted

ALL = {case.name: case for case in CASES}

# Most options once, in decode or in mixed batches: an interpreted kernel takes seconds to compile.
INTERPRETED = [
    *("decode-empty-sequences", "decode-long", "prefill-two-tiles", "mixed-padding-tokens", "speculative"),
    *("no-spare-column", "heads-14q2kv", "storage-padded", "window-long-300", "chunk-and-window", "holes-long"),
    *("shuffled-holes", "context-3-2-4", "soft-cap", "sinks-decode", "int8-as-uint8-head-head", "everything"),
]


# Tables of several pieces: the items start in any of them, and steps run from one into the next.
WIDE = [
    AttentionCase("wide-window", kv_lens=(300, 5, 140, 260), block_size=1, sliding_window=9),
    AttentionCase("wide-steps", kv_lens=(300, 129), query_lens=(2, 9), block_size=1, num_padding_columns=0),
    AttentionCase("wide-shuffled", kv_lens=(280, 20, 150), block_size=1, positions="shuffled", sliding_window=60),
    AttentionCase("wide-holes", kv_lens=(500, 300), query_lens=(20, 1), block_size=2, holes=((0, 130), (1, 128))),
]


@pytest.mark.parametrize("name", INTERPRETED)
def test_against_float64(name: str) -> None:
    check_attention(mosaic_tpu.paged_attention, ALL[name])


def test_nan() -> None:
    check_nan(mosaic_tpu.paged_attention)


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_tables_of_several_pieces(case: AttentionCase) -> None:
    with forced("paged_attention", decode_pages=20, prefill_pages=50):
        check_attention(mosaic_tpu.paged_attention, case, STRICT)


@pytest.mark.parametrize("name", ["decode", "mixed-long", "shuffled-holes"])
def test_with_copies_done_when_they_start(name: str) -> None:
    """In the other interpreter, where a buffer that is still needed is overwritten at once."""
    with forced("paged_attention", decode_pages=4, prefill_pages=8):
        check_attention(mosaic_tpu.paged_attention, ALL[name], True)


def test_a_table_larger_than_scalar_memory() -> None:
    """16 MiB of it, and as much of positions; what is read lies at its end."""
    arguments = make_inputs(AttentionCase("end", kv_lens=(30, 64), positions="shuffled", holes=((1, 2),))).arguments
    given = {name: arguments[name] for name in ("block_tables", "block_positions")}
    wide = {
        name: np.pad(table, ((0, 0), (2**21 - table.shape[1], 0)), constant_values=-1) for name, table in given.items()
    }

    def attend(tables: Any) -> Any:
        return paged_attention(**{**arguments, **tables}, return_lse=True, implementation="mosaic_tpu")

    with interpreted():
        compiled = jax.jit(attend, compiler_options=QUICKLY)
        chex.assert_trees_all_close(compiled(wide), compiled(given), atol=1e-6)


@pytest.mark.parametrize("name", ["q-float16"])
def test_float16_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
        check_attention(mosaic_tpu.paged_attention, ALL[name])


def test_refuses_what_it_cannot_with_the_reason() -> None:
    arguments = make_inputs(ALL["decode"]).arguments
    with pytest.raises(NotImplementedError, match="run on a TPU, and this is for a cpu"):
        paged_attention(**arguments, implementation="mosaic_tpu")
    seqs = 2**16
    many = {
        "q": np.zeros((seqs, 4, 16), np.float32),
        "block_tables": np.full((seqs, 1), -1, np.int32),
        "kv_lens": np.ones(seqs, np.int32),
    }
    with interpret_pallas(), pytest.raises(NotImplementedError, match="scalar memory"):
        jax.eval_shape(lambda: paged_attention(**{**arguments, **many}, implementation="mosaic_tpu"))


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

    def scan() -> Any:
        return jax.lax.scan(lambda _, layer: (None, attend(layer, "mosaic_tpu")), None, layers)[1]

    with interpreted():
        scanned = jax.tree.map(np.asarray, jax.jit(scan, compiler_options=QUICKLY)())
    for i in range(2):
        one = attend(jax.tree.map(lambda x, i=i: x[i], layers), "xla")
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], scanned), one, atol=1e-5)


def test_ids_outside_the_pool_are_as_minus_one() -> None:
    arguments = make_inputs(ALL["decode"]).arguments
    table = arguments["block_tables"].copy()
    table[4, 2] = -1

    def attend(block_tables: Any) -> Any:
        return paged_attention(**{**arguments, "block_tables": block_tables}, implementation="mosaic_tpu")

    with interpreted():
        compiled = jax.jit(attend, compiler_options=QUICKLY)
        expected = np.asarray(compiled(table))
        for bad in (arguments["k_pages"].shape[0], 2**31 - 1, -(2**31)):
            got = np.asarray(compiled(np.where(table < 0, bad, table).astype(np.int32)))
            chex.assert_trees_all_equal(got, expected)
