"""Keeping XLA from copying an array that one program both reads and updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
