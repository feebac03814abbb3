"""One comparison with numpy for each operation, of a Mosaic TPU form or of a broken copy of it, interpreted.

The interpreter is the strict one, where no other is asked for: a copy that nobody waited for has not happened, an
access out of range raises. The other one does a copy when it is started.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.number_format import logical_dtype
from pallas_kernels.paged_attention.arguments import check_arguments
from tests.pallas_kernels import attention_inputs, failed_callbacks, merge_cases, numpy_reference, write_cases
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.page_cases import NUM_PAGES, CopyCase, GatherCase
from tests.pallas_kernels.stored_numbers import bits, logical, random_bits
from tests.pallas_kernels.write_cases import WriteCase

Form = Callable[..., Any]
# Interpreted kernels are long programs that run once: compile them quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIONAL = [
    "query_start_loc",
    "block_positions",
    "sliding_window",
    "chunk_size",
    "context_parallel",
    "scale",
    "logits_soft_cap",
    "sinks",
    "k_scale",
    "v_scale",
    "kv_dtype",
    "v_head_dim",
    "max_query_len",
    "max_kv_len",
]


STRICT = pltpu.InterpretParams()


@contextmanager
def interpreted(mode: Any = STRICT) -> Iterator[None]:
    """Under an interpreter, by default the strict one, whose memory is cleared after."""
    try:
        with failed_callbacks.kept_inside(), interpret_pallas(mode):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def run(form: Form, *arrays: Any, mode: Any = STRICT, **static: Any) -> Any:
    """The form's result as numpy arrays, or the error that it raises."""
    with interpreted(mode):
        compiled = jax.jit(lambda arrays: form(*arrays, **static), compiler_options=QUICKLY)
        return jax.tree.map(np.asarray, compiled(arrays))


def check_gather(form: Form, case: GatherCase) -> None:
    pages, ids = _pages(case), np.array(case.ids, np.int32)
    chex.assert_trees_all_equal(bits(run(form, pages, ids)), numpy_reference.paged_gather(bits(pages), ids))


def check_copy(form: Form, case: CopyCase) -> None:
    pages, src, dst = _pages(case), np.array(case.src, np.int32), np.array(case.dst, np.int32)
    chex.assert_trees_all_equal(bits(run(form, pages, src, dst)), numpy_reference.paged_copy(bits(pages), src, dst))


def check_write(form: Form, case: WriteCase) -> None:
    inputs = write_cases.make_inputs(case)
    given = dict(inputs.arguments)
    kv_dtype = logical_dtype("k_pages", given["k_pages"].dtype, given.pop("kv_dtype"))
    names = ("k_pages", "v_pages", "k", "v", "slot_mapping")
    scales = {name: given[name] for name in ("k_scale", "v_scale")}
    written = run(
        lambda scales, *arrays: form(*arrays, **scales, kv_dtype=kv_dtype), scales, *(given[name] for name in names)
    )
    chex.assert_trees_all_equal(tuple(map(bits, written)), (bits(inputs.k_pages), bits(inputs.v_pages)))


def check_merge(form: Form, case: MergeCase) -> None:
    outs, lses = merge_cases.make_inputs(case)
    out, lse = run(form, outs, lses)
    expected = numpy_reference.merge_attention_states(outs.astype(np.float64), lses.astype(np.float64))
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[case.dtype]
    chex.assert_trees_all_close(out.astype(np.float64), expected[0], atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(lse.astype(np.float64), expected[1], atol=1e-5, rtol=1e-6)


def check_attention(form: Form, case: AttentionCase, mode: Any = STRICT) -> None:
    inputs = attention_inputs.make_inputs(case)
    given, static = check_arguments(**{**dict.fromkeys(OPTIONAL), **inputs.arguments, "return_lse": True})
    out, lse = run(lambda given: form(**given, **static), given, mode=mode)
    assert out.dtype == jnp.dtype(case.q_dtype)
    # Products of bfloat16 take weights of bfloat16, as everybody's do; everything else is float32.
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2}[case.q_dtype] * (20 if case.scale and case.scale > 10 else 1)
    chex.assert_trees_all_close(out.astype(np.float64), inputs.out, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(lse.astype(np.float64), inputs.lse, atol=1e-4, rtol=1e-4)


def _pages(case: GatherCase | CopyCase) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return random_bits(rng, (NUM_PAGES, *case.shape), logical(case.dtype))
