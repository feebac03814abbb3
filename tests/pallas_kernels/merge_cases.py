"""The one table of cases of ``merge_attention_states``."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.pallas_kernels.stored_numbers import logical

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class MergeCase:
    """``unseen``: (state, index into the rest of lses) set to ``unseen_lse``, its output to NaN. A rest of () is the
    whole state."""

    name: str
    num_states: int = 3
    shape: tuple[int, ...] = (5, 4)
    head_dim: int = 8
    dtype: str = "float32"
    spread: float = 1.0
    offset: float = 0.0
    unseen: tuple[tuple[int, tuple[int, ...]], ...] = ()
    unseen_lse: float = -np.inf


_SOME = ((0, (1, 2)), (1, (1, 2)), (2, (0, 0)), (0, (4, 3)))
_ALL = tuple((state, (2, 1)) for state in range(3))

CASES = [
    MergeCase("three"),
    MergeCase("one", num_states=1),
    MergeCase("two", num_states=2),
    MergeCase("seventeen", num_states=17),
    MergeCase("no-tokens", shape=(0, 4)),
    MergeCase("heads-only", shape=(6,)),
    MergeCase("more-dimensions", shape=(2, 3, 2, 4)),
    MergeCase("head-dim-1", head_dim=1),
    MergeCase("head-dim-80", head_dim=80),
    MergeCase("head-dim-128", head_dim=128),
    MergeCase("wide-spread", spread=60.0),
    MergeCase("far-above-0", offset=500.0),
    MergeCase("far-below-0", offset=-500.0),
    MergeCase("some-unseen", unseen=_SOME),
    MergeCase("all-unseen", unseen=_ALL),
    MergeCase("state-unseen", unseen=((1, ()),)),
    MergeCase("everything-unseen", unseen=((0, ()), (1, ()), (2, ()))),
    MergeCase("one-unseen", num_states=1, unseen=((0, (3, 3)),)),
    MergeCase("plus-infinity", unseen=_SOME, unseen_lse=np.inf),
    MergeCase("plus-infinity-all", unseen=_ALL, unseen_lse=np.inf),
    MergeCase("nan", unseen=_SOME, unseen_lse=np.nan),
    MergeCase("nan-all", unseen=_ALL, unseen_lse=np.nan),
    MergeCase("bfloat16", dtype="bfloat16"),
    MergeCase("float16-unseen", dtype="float16", unseen=_SOME),
]


def make_inputs(case: MergeCase) -> tuple[Array, Array]:
    """(outs, lses), NaN in the outputs of states that saw nothing."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    outs = rng.standard_normal((case.num_states, *case.shape, case.head_dim)).astype(logical(case.dtype))
    lses = (rng.standard_normal((case.num_states, *case.shape)) * case.spread + case.offset).astype(np.float32)
    for state, index in case.unseen:
        outs[(state, *index)] = np.nan
        lses[(state, *index)] = case.unseen_lse
    return outs, lses
