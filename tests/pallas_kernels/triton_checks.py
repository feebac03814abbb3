"""One comparison with float64 numpy for each operation, of a form or of a broken copy of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.arguments import check_arguments
from tests.pallas_kernels import numpy_reference
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.attention_inputs import make_inputs
from tests.pallas_kernels.stored_numbers import bits, encode, logical, random_bits

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


def attend(form: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A form of ``paged_attention``, called as the public function would, with the LSE."""
    arrays, static = check_arguments(**{**OPTIONAL, **arguments, "return_lse": True})
    names = ("q", "k_pages", "v_pages", "block_tables", "kv_lens", "query_start_loc")
    positional = [arrays.pop(name) for name in names]
    return form(*positional, **arrays, **static)


def check_attention(form: Callable[..., Any], case: AttentionCase) -> None:
    inputs = make_inputs(case)
    out, lse = attend(form, inputs.arguments)
    assert out.dtype == jnp.dtype(case.q_dtype)
    assert lse.dtype == jnp.float32
    tolerance = TOLERANCE[case.q_dtype] * (20 if case.scale and case.scale > 10 else 1)
    chex.assert_trees_all_close(np.asarray(out, np.float64), inputs.out, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(np.asarray(lse, np.float64), inputs.lse, atol=1e-4, rtol=1e-4)


def check_gather(form: Callable[..., Any], shape: tuple[int, ...], dtype: str, ids: list[int]) -> None:
    pages = random_bits(np.random.default_rng(len(ids)), shape, logical(dtype))
    got = form(jnp.asarray(pages), np.array(ids, np.int32))
    np.testing.assert_array_equal(bits(got), bits(numpy_reference.paged_gather(pages, np.array(ids, np.int32))))


def check_copy(form: Callable[..., Any], shape: tuple[int, ...], dtype: str, src: list[int], dst: list[int]) -> None:
    rng = np.random.default_rng(len(src))
    pages = {name: random_bits(rng, shape, logical(dtype)) for name in "kv"}
    source, target = np.array(src, np.int32), np.array(dst, np.int32)
    got = form(jax.tree.map(jnp.asarray, pages), source, target)
    for name, before in pages.items():
        np.testing.assert_array_equal(bits(got[name]), bits(numpy_reference.paged_copy(before, source, target)))


def check_write(
    form: Callable[..., Any],
    slots: list[int],
    *,
    kv_dtype: str = "float32",
    stored_as: str | None = None,
    values_dtype: str = "float32",
    heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    scales: tuple[Any, Any] = (None, None),
    runs: list[tuple[int, int, int]] | None = None,
) -> None:
    """Written slots hold what numpy stores; every other bit is what it was. ``dims``: of K and V pages, and of k, v."""
    rng = np.random.default_rng(len(slots))
    dtype = logical(kv_dtype)
    storage = logical(stored_as) if stored_as else dtype
    pages = [random_bits(rng, (5, heads, 8, dims[0]), storage) for _ in "kv"]
    values = [
        rng.standard_normal((len(slots), heads, dims[1])).astype(logical(values_dtype)) * np.float32(40) for _ in "kv"
    ]
    values = [x.astype(logical(values_dtype)) for x in values]
    mapping = np.array(slots if runs is None else runs, np.int32)
    got = form(
        *map(jnp.asarray, pages), *values, mapping, k_scale=scales[0], v_scale=scales[1], kv_dtype=jnp.dtype(dtype)
    )
    for written, before, rows, scale in zip(got, pages, values, scales, strict=True):
        divisor = np.float32(1) if scale is None else np.asarray(scale, np.float32)[..., None]
        stored = encode(rows.astype(np.float32) / divisor, dtype).view(storage)
        np.testing.assert_array_equal(bits(written), bits(numpy_reference.paged_write(before, stored, slots)))


def check_merge(form: Callable[..., Any], shape: tuple[int, ...], dtype: str = "float32") -> None:
    """States that saw nothing hold NaN; +inf and NaN LSEs count as -inf; the first row saw nothing at all."""
    rng = np.random.default_rng(shape[0])
    outs = rng.standard_normal(shape).astype(logical(dtype))
    lses = (rng.standard_normal(shape[:-1]) * 9).astype(np.float32)
    lses[:, 0] = -np.inf
    for row, empty in enumerate((-np.inf, np.inf, np.nan)):
        lses[row % shape[0], -1 - row] = empty
    outs[~np.isfinite(lses)] = np.nan
    out, lse = form(jnp.asarray(outs), jnp.asarray(lses))
    expected = numpy_reference.merge_attention_states(outs.astype(np.float64), lses.astype(np.float64))
    tolerance = TOLERANCE[dtype]
    assert out.dtype == jnp.dtype(dtype)
    chex.assert_trees_all_close(np.asarray(out, np.float64), expected[0], atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(np.asarray(lse, np.float64), expected[1], atol=1e-5, rtol=1e-5)
