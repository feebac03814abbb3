"""Tests that need an NVIDIA GPU: the same cases again, compiled instead of interpreted."""

from __future__ import annotations

from typing import Any

import jax
import pytest


def needs_gpu(test: Any) -> Any:
    """Mark ``gpu``; skip where JAX's default backend is none."""
    missing = jax.default_backend() != "gpu"
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))
