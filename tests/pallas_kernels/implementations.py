"""The forms that the shared tables of cases are run against. A new form adds its name here."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.gpu import GPU

IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=GPU)]


def skip_what_it_has_not(implementation: str, case: AttentionCase) -> None:
    """Skip the head dimensions that a form refuses by design."""
    sizes = case.head_dim, case.v_head_dim or case.head_dim
    if implementation == "triton" and any(size % 16 for size in sizes):
        pytest.skip(f"Triton has no head_dim of {sizes}")
