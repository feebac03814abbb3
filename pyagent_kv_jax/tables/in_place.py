"""Keeping XLA from copying an array that one program both reads and updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def after(array: jax.Array, read: jax.Array) -> jax.Array:
    """``array``, unchanged, but available only once ``read`` (integers or flags gathered from it) has been computed.

    XLA copies a whole array when a program gathers from it and, with nothing to say which comes first, scatters into
    it too. An update known only at run time to fall outside the array orders the two, and costs next to nothing. (An
    ``optimization_barrier`` does not help: it is gone before copies are decided. Nor does an update of one element:
    it is fused into later reads, which then read the array from before it.)
    """
    beyond = jnp.clip(jnp.max(read.astype(jnp.int32), initial=0), 0, 1)
    outside = array.shape[0] + beyond + jnp.arange(2, dtype=jnp.int32)
    return array.at[(outside,) + (0,) * (array.ndim - 1)].set(jnp.zeros((), array.dtype), mode="drop")


def erase_rows(array: jax.Array, rows: jax.Array, count: jax.Array, together: int) -> jax.Array:
    """``array`` i32[N, ...] with -1 in all of rows ``rows[:count]``, written ``together`` (static) at a time.

    So the cost follows ``count`` i32[], not the length of ``rows`` i32[n], whose entries past ``count`` are N.
    """
    chunks = max(-(-rows.shape[0] // together), 1)
    padded = jnp.pad(rows, (0, chunks * together - rows.shape[0]), constant_values=array.shape[0])

    def erase(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        array, first = carry
        some = lax.dynamic_slice(padded, (first,), (together,))
        return array.at[some].set(-1, mode="drop"), first + together

    return lax.while_loop(lambda carry: carry[1] < count, erase, (array, jnp.int32(0)))[0]
