"""Tests that need an NVIDIA GPU: the same cases again, compiled instead of interpreted."""

from __future__ import annotations

from typing import Any

import jax
import pytest

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def needs_gpu(test: Any) -> Any:
    """Mark ``gpu``; skip where JAX's default backend is none."""
    for mark in GPU:
        test = mark(test)
    return test
