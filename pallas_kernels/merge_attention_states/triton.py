"""Merge in Triton: one program takes a few rows through all states, twice: their LSEs, then their outputs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.triton_tiles import powers_of_2
from pallas_kernels.tuning import next_power_of_2, parameters

# 2048 numbers of each state: 16 for each of 128 threads.
HEURISTIC = {"numbers": 2048, "num_warps": 4}


def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge ``outs`` [n, ..., heads, d] by ``lses`` [n, ..., heads] over n; see the public function."""
    gpu = target_gpu()
    return merge_states(outs, lses, outs.dtype, gpu)


def merge_states(
    outs: jax.Array, lses: jax.Array, dtype: Any, gpu: Gpu, *, keep_nan: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same, into outputs of ``dtype``. With ``keep_nan``, an LSE of NaN makes NaN of the merged state."""
    shape = {"states": next_power_of_2(outs.shape[0]), "head_dim": outs.shape[-1]}
    chosen = parameters("merge_attention_states", "triton", gpu.kind, shape, HEURISTIC)
    return _merge(outs, lses, dtype=jnp.dtype(dtype), gpu=gpu, keep_nan=keep_nan, **chosen)


@partial(jax.jit, static_argnames=("dtype", "gpu", "keep_nan", "numbers", "num_warps"))
def _merge(
    outs: jax.Array, lses: jax.Array, *, dtype: jnp.dtype, gpu: Gpu, keep_nan: bool, numbers: int, num_warps: int
) -> tuple[jax.Array, jax.Array]:
    states, *batch, head_dim = outs.shape
    total = math.prod(batch)
    if not total or not head_dim:
        return jnp.zeros(outs.shape[1:], dtype), jnp.full(batch, -jnp.inf, jnp.float32)
    rows = next_power_of_2(max(numbers // next_power_of_2(head_dim), 1))
    out, lse = pl.pallas_call(
        partial(merge_rows, rows=rows, keep_nan=keep_nan),
        out_shape=(
            jax.ShapeDtypeStruct((total, head_dim), dtype),
            jax.ShapeDtypeStruct((total,), jnp.float32),
        ),
        grid=(pl.cdiv(total, rows),),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=gpu.interpret,
        name="merge_attention_states",
    )(outs.reshape(states, total, head_dim), lses.reshape(states, total).astype(jnp.float32))
    return out.reshape(*batch, head_dim), lse.reshape(batch)


def merge_rows(outs: Any, lses: Any, out: Any, lse: Any, *, rows: int, keep_nan: bool) -> None:
    """Refs: outs [states, rows, d], lses f32[states, rows], out [rows, d], lse f32[rows].

    Rows past the end are the last one again: computed twice, written twice, alike.
    """
    states, total_rows, head_dim = outs.shape
    row = jnp.minimum(pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32), total_rows - 1)
    pieces = powers_of_2(head_dim)

    def read(state: Any) -> jax.Array:
        value = lses[state, row]
        counts = jnp.abs(value) < jnp.inf  # +inf and NaN count as -inf too
        return jnp.where(counts | (value != value) if keep_nan else counts, value, -jnp.inf)

    highest = jax.lax.fori_loop(
        0, states, lambda i, so_far: jnp.maximum(so_far, read(i)), jnp.full(rows, -jnp.inf, jnp.float32)
    )
    base = jnp.where(highest == -jnp.inf, 0.0, highest)  # exp(-inf - -inf) is NaN

    def add(state: Any, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        total, values = carry
        weight = jnp.exp(read(state) - base)

        def picked(dims: Any) -> jax.Array:
            # Selected, not multiplied: a state that saw nothing may hold NaN, and 0 * NaN is NaN.
            seen = jnp.where((weight > 0)[:, None], outs[state, row, dims].astype(jnp.float32), 0.0)
            return seen * weight[:, None]

        return total + weight, [value + picked(dims) for value, dims in zip(values, pieces, strict=True)]

    zeros = [jnp.zeros((rows, dims.size), jnp.float32) for dims in pieces]
    total, values = jax.lax.fori_loop(0, states, add, (jnp.zeros(rows, jnp.float32), zeros))
    for value, dims in zip(values, pieces, strict=True):
        out[row, dims] = (value / jnp.where(total > 0, total, 1.0)[:, None]).astype(out.dtype)
    lse[row] = base + jnp.log(total)
