"""The whole of the shared table of attention cases, interpreted: minutes, so not among the default tests."""

from __future__ import annotations

import pytest

from pallas_kernels.paged_attention import mosaic_tpu
from tests.pallas_kernels.attention_cases import CASES, AttentionCase
from tests.pallas_kernels.mosaic_checks import check_attention


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case: AttentionCase) -> None:
    if "float16" in (case.q_dtype, case.kv_dtype):
        with pytest.raises(NotImplementedError, match="no arithmetic in float16"):
            check_attention(mosaic_tpu.paged_attention, case)
    else:
        check_attention(mosaic_tpu.paged_attention, case)
