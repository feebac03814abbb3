"""One comparison with float64 numpy for each operation, of a form or of a broken copy of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pallas_kernels.interpret import interpret_mode
from pallas_kernels.number_format import logical_dtype
from pallas_kernels.paged_attention.arguments import check_arguments
from tests.pallas_kernels import attention_inputs, merge_cases, numpy_reference, write_cases
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.page_cases import NUM_PAGES, CopyCase, GatherCase
from tests.pallas_kernels.stored_numbers import bits, logical, random_bits
from tests.pallas_kernels.write_cases import WriteCase

Form = Callable[..., Any]
# Interpreted kernels are long programs that run once: compile them quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
OPTIONAL = {
    "query_start_loc": None,
    "causal": True,
    "sliding_window": None,
    "chunk_size": None,
    "block_positions": None,
    "context_parallel": None,
    "scale": None,
    "logits_soft_cap": None,
    "sinks": None,
    "k_scale": None,
    "v_scale": None,
    "kv_dtype": None,
    "v_head_dim": None,
    "max_query_len": None,
    "max_kv_len": None,
}
# Small steps and tiles, so that short cases have several of each; forced on the interpreted kernels.
SMALL_TILES = {"decode_keys": 16, "prefill_keys": 16, "prefill_rows": 32, "fewest_keys": 16, "programs_per_core": 8}


def run(form: Form, *arrays: Any, **given: Any) -> Any:
    """The form's result as numpy arrays, or the error that it raises."""
    traced = {name: given.pop(name) for name in ("k_scale", "v_scale") if name in given}
    options = QUICKLY if interpret_mode() else None
    compiled = jax.jit(lambda arrays, traced: form(*arrays, **traced, **given), compiler_options=options)
    return jax.tree.map(np.asarray, compiled(arrays, traced))


def attend(form: Form, arguments: dict[str, Any]) -> Any:
    """A form of ``paged_attention``, called as the public function would, with the LSE."""
    arrays, static = check_arguments(**{**OPTIONAL, **arguments, "return_lse": True})
    return run(lambda arrays: form(**arrays, **static), arrays)


def check_attention(form: Form, case: AttentionCase) -> None:
    inputs = attention_inputs.make_inputs(case)
    out, lse = attend(form, inputs.arguments)
    assert out.dtype == jnp.dtype(case.q_dtype)
    assert lse.dtype == jnp.float32
    tolerance = TOLERANCE[case.q_dtype] * (20 if case.scale and case.scale > 10 else 1)
    chex.assert_trees_all_close(out.astype(np.float64), inputs.out, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(lse.astype(np.float64), inputs.lse, atol=1e-4, rtol=1e-4)


def check_nan(form: Form) -> None:
    """A key of NaN makes NaN of whatever sees it, and of nothing else: it is in sight where something went wrong."""
    case = AttentionCase("nan", kv_lens=(9, 300, 40), query_lens=(1, 1, 40), block_size=8)
    inputs = attention_inputs.make_inputs(case)
    given = {**inputs.arguments, "k_pages": inputs.arguments["k_pages"].copy()}
    group, sees = case.q_heads // case.kv_heads, np.zeros(inputs.lse.shape, bool)
    for sequence, position in ((1, 250), (2, 17)):
        page = given["block_tables"][sequence, position // case.block_size]
        given["k_pages"][page, -1, position % case.block_size, 0] = np.nan
        first, end = given["query_start_loc"][sequence : sequence + 2]
        seen_by = np.arange(first, end) >= end - case.kv_lens[sequence] + position
        sees[first:end, -group:] = seen_by[:, None]
    out, lse = attend(form, given)
    chex.assert_trees_all_close(lse, np.where(sees, np.nan, inputs.lse), atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_close(out, np.where(sees[..., None], np.nan, inputs.out), atol=2e-5, rtol=2e-5)


def check_gather(form: Form, case: GatherCase) -> None:
    pages, ids = pages_of(case), np.array(case.ids, np.int32)
    chex.assert_trees_all_equal(bits(run(form, pages, ids)), numpy_reference.paged_gather(bits(pages), ids))


def check_copy(form: Form, case: CopyCase) -> None:
    pages, src, dst = pages_of(case), np.array(case.src, np.int32), np.array(case.dst, np.int32)
    copied = run(form, {"k": pages, "v": pages[:, :1]}, src, dst)
    expected = numpy_reference.paged_copy(bits(pages), src, dst)
    chex.assert_trees_all_equal(jax.tree.map(bits, copied), {"k": expected, "v": expected[:, :1]})


def pages_of(case: CopyCase | GatherCase) -> NDArray[Any]:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return random_bits(rng, (NUM_PAGES, *case.shape), logical(case.dtype))


def check_write(form: Form, case: WriteCase) -> None:
    """Written slots hold what numpy stores; every other bit is what it was."""
    inputs = write_cases.make_inputs(case)
    given = dict(inputs.arguments)
    given["kv_dtype"] = logical_dtype("k_pages", given["k_pages"].dtype, given["kv_dtype"])
    names = ("k_pages", "v_pages", "k", "v", "slot_mapping")
    written = run(form, *(given.pop(name) for name in names), **given)
    chex.assert_trees_all_equal(jax.tree.map(bits, written), (bits(inputs.k_pages), bits(inputs.v_pages)))


def check_merge(form: Form, case: MergeCase) -> None:
    outs, lses = merge_cases.make_inputs(case)
    out, lse = run(form, outs, lses)
    assert out.dtype == outs.dtype
    assert lse.dtype == np.float32
    expected = numpy_reference.merge_attention_states(outs.astype(np.float64), lses.astype(np.float64))
    tolerance = TOLERANCE[case.dtype]
    chex.assert_trees_all_close(out.astype(np.float64), expected[0], atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(lse.astype(np.float64), expected[1], atol=1e-5, rtol=1e-5)
