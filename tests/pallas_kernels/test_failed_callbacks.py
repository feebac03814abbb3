"""A kernel that fails in an interpreter fails no kernel after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from tests.pallas_kernels import failed_callbacks


@jax.jit
def _later(x: jax.Array) -> jax.Array:
    """Some ten milliseconds' work: what needs it is enqueued, and fails after it was."""
    return lax.fori_loop(0, 30, lambda _, y: jnp.sin(y @ y), x)


def _call_back(*, fails: bool) -> jax.Array:
    def on_host(_: jax.Array) -> np.int32:
        if fails:
            raise RuntimeError("on purpose")
        return np.int32(7)

    call = jax.jit(lambda x: io_callback(on_host, jnp.int32(0), x[0, 0], ordered=True))
    return call(_later(jnp.ones((600, 600))))


def test_kept_inside() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="on purpose"), failed_callbacks.kept_inside():
        _call_back(fails=True).block_until_ready()
    assert _call_back(fails=False) == 7


def test_a_failure_that_nobody_looked_at_is_raised() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="on purpose"), failed_callbacks.kept_inside():
        _call_back(fails=True)
    assert _call_back(fails=False) == 7
