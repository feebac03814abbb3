"""Every case of the table, in every form, against float64 numpy."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_attention_states
from tests.pallas_kernels import numpy_reference
from tests.pallas_kernels.implementations import IMPLEMENTATIONS
from tests.pallas_kernels.merge_cases import CASES, MergeCase, make_inputs

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case: MergeCase, implementation: str) -> None:
    outs, lses = make_inputs(case)
    out, lse = merge_attention_states(outs, lses, implementation=implementation)
    assert out.dtype == outs.dtype
    assert lse.dtype == jnp.float32
    expected = numpy_reference.merge_attention_states(outs.astype(np.float64), lses.astype(np.float64))
    tolerance = TOLERANCE[case.dtype]
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected[0], atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(np.asarray(lse, np.float64), expected[1], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_order_of_merging_does_not_matter(implementation: str) -> None:
    outs, lses = make_inputs(CASES[3])
    whole = merge_attention_states(outs, lses, implementation=implementation)
    parts = [
        merge_attention_states(outs[i], lses[i], implementation=implementation) for i in np.split(np.arange(17), [5, 6])
    ]
    again = merge_attention_states(
        jnp.stack([out for out, _ in parts]), jnp.stack([lse for _, lse in parts]), implementation=implementation
    )
    chex.assert_trees_all_close(again, whole, atol=1e-5)
