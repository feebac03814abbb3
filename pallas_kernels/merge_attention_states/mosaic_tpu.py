"""Merge on TPUs: one pass over the outputs, a tile of rows at a time, with all its states."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import LANES, SUBLANES, compiler_params, require_arithmetic, require_parameters
from pallas_kernels.tpu import Tpu, target_tpu
from pallas_kernels.tuning import parameters

MAX_TILE_BYTES = 4 * 2**20
MAX_ROWS = 1024


def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge ``outs`` [n, ..., heads, d] by ``lses`` [n, ..., heads] over n; see the public function."""
    tpu = target_tpu()
    require_arithmetic(outs.dtype)
    states, head_dim = outs.shape[0], outs.shape[-1]
    shape = {"states": states, "head_dim": head_dim, "itemsize": outs.dtype.itemsize}
    chosen = parameters("merge_attention_states", "mosaic_tpu", tpu.kind, shape, heuristic(states, head_dim))
    fit = chosen["rows"] >= LANES and chosen["rows"] % LANES == 0
    require_parameters("merge_attention_states", chosen, fit, f"multiples of {LANES}")
    return _merge(outs, lses, tpu=tpu, **chosen)


def heuristic(states: int, head_dim: int) -> dict[str, int]:
    """Rows of a tile, a multiple of 128: as many as make MAX_TILE_BYTES in float32."""
    row_bytes = 4 * states * pl.cdiv(head_dim, LANES) * LANES
    return {"rows": max(LANES, min(MAX_ROWS, MAX_TILE_BYTES // row_bytes) // LANES * LANES)}


@partial(jax.jit, static_argnames=("tpu", "rows"))
def _merge(outs: jax.Array, lses: jax.Array, *, tpu: Tpu, rows: int) -> tuple[jax.Array, jax.Array]:
    states, *shape, dim = outs.shape
    outs = outs.reshape(states, -1, dim)
    num_rows = outs.shape[1]
    if outs.size == 0:
        return jnp.zeros((*shape, dim), outs.dtype), jnp.full(shape, -jnp.inf, jnp.float32)
    # Weights are computed with rows along lanes and states along sublanes, then turned: that wants whole tiles.
    padding = -states % SUBLANES
    lses = lses.reshape(states, -1).astype(jnp.float32)
    lses = jnp.pad(lses, ((0, padding), (0, 0)), constant_values=-jnp.inf)
    out, lse = pl.pallas_call(
        _kernel,
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, dim), outs.dtype),
            jax.ShapeDtypeStruct((1, num_rows), jnp.float32),
        ),
        grid=(pl.cdiv(num_rows, rows),),
        in_specs=[
            pl.BlockSpec((states, rows, dim), lambda i: (0, i, 0)),
            pl.BlockSpec((lses.shape[0], rows), lambda i: (0, i)),
        ],
        out_specs=(pl.BlockSpec((rows, dim), lambda i: (i, 0)), pl.BlockSpec((1, rows), lambda i: (0, i))),
        compiler_params=compiler_params("parallel"),
        interpret=tpu.interpret,
        name="merge_attention_states",
    )(outs, lses)
    return out.reshape(*shape, dim), lse.reshape(shape)


def _kernel(outs: Any, lses: Any, out: Any, lse: Any) -> None:
    """outs [n, rows, d], lses f32[n rounded up to 8, rows]; out [rows, d], lse f32[1, rows]."""
    each = lses[...]
    seen = (each > -jnp.inf) & (each < jnp.inf)  # NaN is neither
    highest = jnp.max(jnp.where(seen, each, -jnp.inf), axis=0, keepdims=True)
    highest = jnp.where(highest > -jnp.inf, highest, 0)  # exp(-inf - -inf) is NaN
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, each, 0) - highest), 0)
    total = jnp.sum(weights, axis=0, keepdims=True)
    lse[...] = highest + jnp.log(total)
    shares = jnp.transpose(weights / jnp.where(total > 0, total, 1))  # [rows, n]
    merged = jnp.zeros(out.shape, jnp.float32)
    for state in range(outs.shape[0]):
        share = shares[:, state : state + 1]
        # Selected, not multiplied: a state that saw nothing may hold NaN, and 0 * NaN is NaN.
        merged += jnp.where(share > 0, outs[state].astype(jnp.float32), 0) * share
    out[...] = merged.astype(out.dtype)
