"""How the tests compile: quickly, because most of their time is XLA compiling small programs that run once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest

_OPTION = "jax_disable_most_optimizations"
_COMPILE_BOUND = ("manager", "models", "pallas_kernels", "pool", "serving", "tables")


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """LLVM's level 0 on CPU, which leaves memory figures alone; ``JAX_DISABLE_MOST_OPTIMIZATIONS`` overrules it."""
    chosen = request.path.parent.name in _COMPILE_BOUND and _OPTION.upper() not in os.environ
    if not chosen or jax.default_backend() != "cpu":
        yield
        return
    before = jax.config.read(_OPTION)
    jax.config.update(_OPTION, True)
    yield
    jax.config.update(_OPTION, before)
