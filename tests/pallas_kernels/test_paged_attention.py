"""Every case of the shared table, in every form, against float64 numpy; then what a table cannot say."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import checking, merge_attention_states, paged_attention
from pallas_kernels.paged_attention import reference
from tests.pallas_kernels.attention_cases import CASES, AttentionCase
from tests.pallas_kernels.attention_inputs import make_inputs
from tests.pallas_kernels.form_checks import check_nan
from tests.pallas_kernels.implementations import IMPLEMENTATIONS, skip_what_it_has_not

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case: AttentionCase, implementation: str) -> None:
    skip_what_it_has_not(implementation, case)
    inputs = make_inputs(case)
    out, lse = paged_attention(**inputs.arguments, return_lse=True, implementation=implementation)
    assert out.dtype == jnp.dtype(case.q_dtype)
    assert lse.dtype == jnp.float32
    tolerance = TOLERANCE[case.q_dtype] * (20 if case.scale and case.scale > 10 else 1)
    chex.assert_trees_all_close(np.asarray(out, np.float64), inputs.out, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(np.asarray(lse, np.float64), inputs.lse, atol=1e-4, rtol=1e-4)


def test_case_names_are_distinct() -> None:
    assert len(CASE) == len(CASES)


def test_nan() -> None:
    check_nan(reference.paged_attention)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_lse_returns_the_same_output_alone(implementation: str) -> None:
    arguments = make_inputs(CASE["mixed"]).arguments
    out, _ = paged_attention(**arguments, return_lse=True, implementation=implementation)
    alone = paged_attention(**arguments, implementation=implementation)
    chex.assert_trees_all_equal(out, alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_traced_window_rank_and_scales_in_one_compiled_scan(implementation: str) -> None:
    """What varies by layer varies inside a scan, without a compilation each."""
    case = AttentionCase("traced", kv_lens=(33, 64), query_lens=(2, 20), k_scale="head", v_scale="tensor")
    windows, ranks = [3, 17, 2**31 - 1], [0, 1, 1]
    arguments = make_inputs(case).arguments
    per_layer: dict[str, Any] = {
        "sliding_window": np.array(windows, np.int32),
        "rank": np.array(ranks, np.int32),
        "k_scale": np.stack([arguments["k_scale"] * (i + 1) for i in range(3)]),
        "scale": np.array([0.1, 0.2, 0.3], np.float32),
        "logits_soft_cap": np.array([1.0, 5.0, 9.0], np.float32),
    }
    arguments["chunk_size"] = np.int32(50)

    def attend(layer: dict[str, Any]) -> Any:
        layer = dict(layer)
        context = (2, layer.pop("rank"), 4)
        given = {**arguments, **layer, "context_parallel": context}
        return paged_attention(**given, return_lse=True, implementation=implementation)

    scanned = jax.jit(lambda: jax.lax.scan(lambda _, layer: (None, attend(layer)), None, per_layer)[1])()
    for i in range(3):
        one = attend(jax.tree.map(lambda x, i=i: x[i], per_layer))
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], scanned), one, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("size", "interleave"), [(2, 1), (3, 4), (4, 8)])
def test_ranks_merge_to_the_whole(size: int, interleave: int, implementation: str) -> None:
    """Each rank reads its own share; merged by LSE they are attention over everything."""
    rng = np.random.default_rng(size)
    kv_lens, block_size = np.array([61, 7, 30], np.int32), 8
    q = rng.standard_normal((3, 4, 16)).astype(np.float32)
    keys, values = rng.standard_normal((2, 3, 64, 2, 16)).astype(np.float32)
    whole = paged_attention(
        q, *_pages_of(keys, values, kv_lens, block_size, 1, 0, 1), return_lse=True, implementation=implementation
    )
    states = [
        paged_attention(
            q,
            *_pages_of(keys, values, kv_lens, block_size, size, rank, interleave),
            context_parallel=(size, rank, interleave),
            return_lse=True,
            implementation=implementation,
        )
        for rank in range(size)
    ]
    merged = merge_attention_states(jnp.stack([o for o, _ in states]), jnp.stack([lse for _, lse in states]))
    chex.assert_trees_all_close(merged, whole, atol=1e-5)


def _pages_of(keys: Any, values: Any, kv_lens: Any, block_size: int, size: int, rank: int, interleave: int) -> Any:
    """K and V pages, tables and lengths of one rank's share; poison where it holds nothing."""
    width = -(-keys.shape[1] // (block_size * size))
    tables = np.arange(len(kv_lens) * width, dtype=np.int32).reshape(len(kv_lens), width)
    pages = np.full((2, tables.size, keys.shape[2], block_size, keys.shape[3]), np.nan, np.float32)
    for s, kv_len in enumerate(kv_lens):
        mine = [x for x in range(kv_len) if (x // interleave) % size == rank]
        for local, x in enumerate(mine):
            page = tables[s, local // block_size]
            pages[:, page, :, local % block_size] = keys[s, x], values[s, x]
    return pages[0], pages[1], tables, kv_lens


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_interleave_larger_than_a_kernel_block(implementation: str) -> None:
    """A manager block of two kernel blocks may be dealt out in runs as long as the whole of it."""
    rng = np.random.default_rng(5)
    kv_lens = np.array([61, 40], np.int32)
    q = rng.standard_normal((2, 2, 16)).astype(np.float32)
    keys, values = rng.standard_normal((2, 2, 64, 2, 16)).astype(np.float32)
    parts = [_pages_of(keys, values, kv_lens, 8, 2, rank, 16) for rank in range(2)]
    states = [
        paged_attention(q, *part, context_parallel=(2, rank, 16), return_lse=True, implementation=implementation)
        for rank, part in enumerate(parts)
    ]
    merged = merge_attention_states(jnp.stack([o for o, _ in states]), jnp.stack([lse for _, lse in states]))
    whole = paged_attention(
        q, *_pages_of(keys, values, kv_lens, 8, 1, 0, 1), return_lse=True, implementation=implementation
    )
    chex.assert_trees_all_close(merged, whole, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ids_outside_the_pool_are_as_minus_one(implementation: str) -> None:
    arguments = make_inputs(CASE["holes"]).arguments
    expected = paged_attention(**arguments, implementation=implementation)
    num_pages = arguments["k_pages"].shape[0]
    for bad in (num_pages, 2**31 - 1, -2, -(2**31)):
        arguments["block_tables"] = np.where(arguments["block_tables"] < 0, bad, arguments["block_tables"])
        arguments["block_tables"] = arguments["block_tables"].astype(np.int32)
        chex.assert_trees_all_equal(paged_attention(**arguments, implementation=implementation), expected)
        arguments["block_tables"] = np.where(arguments["block_tables"] == bad, -1, arguments["block_tables"])
        arguments["block_tables"] = arguments["block_tables"].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tables": np.full((5, 9), 99, np.int32)}, "block_tables"),
        ({"block_tables": np.full((5, 9), -2, np.int32)}, "block_tables"),
        ({"kv_lens": np.array([5, 33, 20, 73, 16], np.int32)}, "kv_lens"),
        ({"kv_lens": np.array([5, 33, -1, 64, 16], np.int32)}, "kv_lens"),
        ({"query_start_loc": np.array([0, 5, 4, 26, 29, 30], np.int32)}, "query_start_loc"),
        ({"query_start_loc": np.array([0, 5, 6, 26, 29, 31], np.int32)}, "query_start_loc"),
        ({"sliding_window": np.int32(0)}, "sliding_window"),
    ],
)
def test_checking_mode_reports(change: dict[str, Any], message: str) -> None:
    arguments = make_inputs(CASE["mixed"]).arguments
    static = {"causal": arguments.pop("causal"), "max_query_len": arguments.pop("max_query_len")}

    @jax.jit
    def attend(arguments: dict[str, Any]) -> Any:
        return paged_attention(**arguments, **static)

    checked = checkify.checkify(attend, errors=checkify.user_checks)
    with checking():
        error, _ = checked(arguments)
        assert error.get() is None
        error, _ = checked({**arguments, **change})
    assert message in error.get()


def test_gradient_is_refused() -> None:
    arguments = make_inputs(CASE["mixed"]).arguments
    q = arguments.pop("q")
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(NotImplementedError, match="no gradient"):
            transform(lambda q: paged_attention(q, **arguments).sum())(jnp.asarray(q))
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.jvp(
            lambda k: paged_attention(q, **{**arguments, "k_pages": k}),
            (q[:0],) * 0 or (jnp.asarray(arguments["k_pages"]),),
            (jnp.asarray(arguments["k_pages"]),),
        )
    stopped = jax.grad(lambda q: paged_attention(jax.lax.stop_gradient(q), **arguments).sum() + q.sum())
    chex.assert_trees_all_equal(stopped(jnp.asarray(q)), jnp.ones(q.shape))


def test_other_lengths_do_not_recompile() -> None:
    """Lengths, tables and masks are data: one compilation serves them all."""
    first = make_inputs(CASE["mixed"]).arguments
    first["sliding_window"] = np.int32(9)
    jax.block_until_ready(paged_attention(**first))
    compiled = reference.paged_attention._cache_size()
    second = dict(first)
    second["kv_lens"] = np.array([60, 1, 33, 0, 64], np.int32)
    second["query_start_loc"] = np.array([0, 29, 29, 30, 30, 30], np.int32)
    second["block_tables"] = np.roll(first["block_tables"], 1, axis=0)
    second["sliding_window"] = np.int32(30)
    jax.block_until_ready(paged_attention(**second))
    assert reference.paged_attention._cache_size() == compiled
