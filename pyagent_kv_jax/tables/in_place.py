"""Keeping XLA from copying an array that one program both reads and updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def after(array: jax.Array, read: jax.Array) -> jax.Array:
    """``array``, unchanged, but available only once ``read`` (integers gathered from it) has been computed.

    XLA copies a whole array when a program gathers from it and, with nothing to say which comes first, scatters into
    it too. An update known only at run time to fall outside the array orders the two and costs one element. (An
    ``optimization_barrier`` does not: it is gone before copies are decided.)
    """
    outside = array.shape[0] + jnp.clip(jnp.max(read, initial=0), 0, 1).astype(jnp.int32)
    nothing = jnp.zeros((), array.dtype)
    return array.at[(outside,) + (0,) * (array.ndim - 1)].set(nothing, mode="drop")
