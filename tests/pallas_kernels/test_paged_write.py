"""Every case of the table, in every form: the slots written hold the numbers, all others their old bits."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import CompressedSlotMapping, checking, paged_write
from pallas_kernels.paged_write import reference
from tests.pallas_kernels.implementations import IMPLEMENTATIONS
from tests.pallas_kernels.stored_numbers import bits
from tests.pallas_kernels.write_cases import CASES, WriteCase, make_inputs

CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_slot(case: WriteCase, implementation: str) -> None:
    inputs = make_inputs(case)
    k_pages, v_pages = paged_write(**inputs.arguments, implementation=implementation)
    assert k_pages.dtype == inputs.k_pages.dtype
    chex.assert_trees_all_equal(bits(k_pages), bits(inputs.k_pages))
    chex.assert_trees_all_equal(bits(v_pages), bits(inputs.v_pages))


def test_case_names_are_distinct() -> None:
    assert len(CASE) == len(CASES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kv_dtype", "nan_becomes"), [("int8", 0.0), ("float8_e4m3fn", np.nan), ("float32", np.nan)])
def test_nan_is_kept_where_the_format_has_one(kv_dtype: str, nan_becomes: float, implementation: str) -> None:
    pages = jnp.ones((2, 1, 4, 8), kv_dtype)
    nan = np.full((1, 1, 8), np.nan, np.float32)
    slots = np.array([5], np.int32)
    written, _ = paged_write(pages, pages, nan, nan, slots, implementation=implementation)
    chex.assert_trees_all_equal(np.asarray(written, np.float32)[1, 0, 1], np.full(8, nan_becomes, np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_and_runs_that_say_the_same_write_the_same(implementation: str) -> None:
    arguments = make_inputs(CASE["runs-across-blocks"]).arguments
    by_runs = paged_write(**arguments, implementation=implementation)
    arguments["slot_mapping"] = np.arange(3, 14, dtype=np.int32)
    chex.assert_trees_all_equal(by_runs, paged_write(**arguments, implementation=implementation))


@pytest.mark.parametrize(
    ("slot_mapping", "message"),
    [
        (np.array([0] * 10 + [24], np.int32), "slot_mapping"),
        (np.array([0] * 10 + [-2], np.int32), "slot_mapping"),
        (np.array([[20, 0, 11]], np.int32), "slot_mapping"),
        (np.array([[0, 4, 8]], np.int32), "slot_mapping"),
        (np.array([[0, 0, 11], [12, 3, 4]], np.int32), "slot_mapping"),
        (CompressedSlotMapping(np.array([0, 1, 2], np.int32), 4), "words of 12 tokens, want 11 at most"),
        (CompressedSlotMapping(np.array([-2, 24], np.int32), 4), "slot_mapping: got ids"),
    ],
)
def test_checking_mode_reports(slot_mapping: Any, message: str) -> None:
    checked = checkify.checkify(jax.jit(paged_write), errors=checkify.user_checks)
    arguments = make_inputs(CASE["random-slots"]).arguments
    arguments.pop("kv_dtype")
    with checking():
        error, _ = checked(**arguments)
        assert error.get() is None
        error, _ = checked(**{**arguments, "slot_mapping": slot_mapping})
    assert message in error.get()


def test_other_slots_do_not_recompile() -> None:
    arguments = make_inputs(CASE["random-slots"]).arguments
    paged_write(**arguments)
    compiled = reference.paged_write._cache_size()
    paged_write(**{**arguments, "slot_mapping": np.full_like(arguments["slot_mapping"], -1)})
    assert reference.paged_write._cache_size() == compiled
