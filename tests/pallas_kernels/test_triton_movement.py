"""The Triton forms of gather, copy, write and merge: interpreted here, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_attention_states, paged_copy, paged_gather, paged_write
from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.merge_attention_states import triton as merge
from pallas_kernels.paged_copy import triton as copy
from pallas_kernels.paged_gather import triton as gather
from pallas_kernels.paged_write import triton as write
from tests.pallas_kernels import merge_cases, write_cases
from tests.pallas_kernels.gpu import needs_gpu
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.page_cases import COPY_CASES, GATHER_CASES, CopyCase, GatherCase
from tests.pallas_kernels.triton_checks import check_copy, check_gather, check_merge, check_write
from tests.pallas_kernels.write_cases import WriteCase

# What the shared tables have not: pages whose words do not come in powers of two, and the pieces that Triton makes of
# head dimensions and head counts.
GATHER = [
    *GATHER_CASES,
    GatherCase("20-wide", (4, -1, 8), shape=(3, 8, 20)),
    GatherCase("odd", (1, 8), "int8", (1, 1, 3)),
]
COPY = [
    *COPY_CASES,
    CopyCase("20-wide", (0, 1, 2), (1, 2, 0), shape=(3, 8, 20)),
    CopyCase("odd", (3,), (4,), "int8", (1, 1, 3)),
]
WRITE = [
    *write_cases.CASES,
    WriteCase("head-dim-80", head_dim=80, v_head_dim=96, storage_head_dim=96, v_storage_head_dim=96, kv_heads=3),
    WriteCase(
        "bfloat16-to-int8-80", head_dim=80, storage_head_dim=80, dtype="bfloat16", kv_dtype="int8", k_scale="head"
    ),
]
MERGE = [*merge_cases.CASES, MergeCase("more-rows-than-one-program", shape=(40, 3), head_dim=128)]
CHECKS: dict[str, Callable[[], None]] = {
    **{f"gather-{case.name}": partial(check_gather, gather.paged_gather, case) for case in GATHER},
    **{f"copy-{case.name}": partial(check_copy, copy.paged_copy, case) for case in COPY},
    **{f"write-{case.name}": partial(check_write, write.paged_write, case) for case in WRITE},
    **{f"merge-{case.name}": partial(check_merge, merge.merge_attention_states, case) for case in MERGE},
}


@pytest.mark.parametrize("name", list(CHECKS))
def test_against_numpy_interpreted(name: str) -> None:
    with interpret_pallas():
        CHECKS[name]()


@needs_gpu
@pytest.mark.parametrize("name", list(CHECKS))
def test_against_numpy_on_a_gpu(name: str) -> None:
    CHECKS[name]()


def test_each_is_found_by_name_and_says_why_not() -> None:
    pages, ids = jnp.zeros((2, 1, 8, 16)), jnp.zeros(1, jnp.int32)
    token = jnp.zeros((1, 1, 16))
    calls: list[Callable[..., Any]] = [
        lambda **kw: paged_gather(pages, ids, **kw),
        lambda **kw: paged_copy(pages, ids, ids, **kw),
        lambda **kw: paged_write(pages, pages, token, token, ids, **kw),
        lambda **kw: merge_attention_states(token[None], token[None, ..., 0], **kw),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="'triton': Triton kernels run on NVIDIA GPUs"):
            call(implementation="triton")
        with interpret_pallas():
            triton, xla = call(implementation="triton"), call(implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, triton, xla)


@needs_gpu
@pytest.mark.parametrize(("dtype", "elements"), [("bfloat16", 2**31), ("uint8", 2**31), ("uint8", 2**32)])
def test_pool_of_more_than_2_to_31_elements(dtype: str, elements: int) -> None:
    """What is moved to the far end of a large pool, and back."""
    shape = (8, 16, 128)
    num_pages = elements // int(np.prod(shape)) + 5
    last = num_pages - 1
    rng = np.random.default_rng(0)
    source = jnp.asarray(rng.integers(0, 100, (2, *shape))).astype(dtype)
    pages = jax.jit(lambda x: jnp.zeros((num_pages, *shape), dtype).at[:2].set(x))(source)
    moved = jax.jit(copy.paged_copy, donate_argnums=0)(pages, jnp.array([0, 1]), jnp.array([last, last - 3]))
    got = gather.paged_gather(moved, jnp.array([last, last - 3, last - 1], jnp.int32))
    np.testing.assert_array_equal(np.asarray(got[:2]), np.asarray(source))
    assert not np.asarray(got[2]).any()
