"""Programs counted by a test are its own."""

from __future__ import annotations

import pytest

from pyagent_kv_jax.distributed.batch.planned_attention import compiled_attention


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    compiled_attention.cache_clear()  # executors of one config share programs, also with another test's
