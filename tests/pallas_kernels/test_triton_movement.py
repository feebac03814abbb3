"""The Triton forms of gather, copy, write and merge: interpreted on the shared cases, and on cases of their own.

Compiled, on a GPU, they run the shared cases in the tests of each operation.
"""

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
from tests.pallas_kernels.form_checks import check_copy, check_gather, check_merge, check_write
from tests.pallas_kernels.gpu import needs_gpu
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.page_cases import COPY_CASES, GATHER_CASES, CopyCase, GatherCase
from tests.pallas_kernels.stored_numbers import bits
from tests.pallas_kernels.write_cases import WriteCase

# What the shared tables have not: pages whose words do not come in powers of two, and the pieces that Triton makes of
# head dimensions and head counts.
GATHER = [
    GatherCase("20-wide", (4, -1, 8), shape=(3, 8, 20)),
    GatherCase("odd", (1, 8), "int8", (1, 1, 3)),
]
COPY = [
    CopyCase("20-wide", (0, 1, 2), (1, 2, 0), shape=(3, 8, 20)),
    CopyCase("odd", (3,), (4,), "int8", (1, 1, 3)),
]
WRITE = [
    WriteCase("head-dim-80", head_dim=80, v_head_dim=96, storage_head_dim=96, v_storage_head_dim=96, kv_heads=3),
    WriteCase(
        "bfloat16-to-int8-80", head_dim=80, storage_head_dim=80, dtype="bfloat16", kv_dtype="int8", k_scale="head"
    ),
]
MERGE = [MergeCase("more-rows-than-one-program", shape=(40, 3), head_dim=128)]


def checks(
    gathers: list[GatherCase], copies: list[CopyCase], writes: list[WriteCase], merges: list[MergeCase]
) -> dict[str, Callable[[], None]]:
    return {
        **{f"gather-{case.name}": partial(check_gather, gather.paged_gather, case) for case in gathers},
        **{f"copy-{case.name}": partial(check_copy, copy.paged_copy, case) for case in copies},
        **{f"write-{case.name}": partial(check_write, write.paged_write, case) for case in writes},
        **{f"merge-{case.name}": partial(check_merge, merge.merge_attention_states, case) for case in merges},
    }


MORE = checks(GATHER, COPY, WRITE, MERGE)
ALL = checks(GATHER_CASES, COPY_CASES, write_cases.CASES, merge_cases.CASES) | MORE


@pytest.mark.parametrize("name", list(ALL))
def test_against_numpy_interpreted(name: str) -> None:
    with interpret_pallas():
        ALL[name]()


@needs_gpu
@pytest.mark.parametrize("name", list(MORE))
def test_against_numpy_on_a_gpu(name: str) -> None:
    MORE[name]()


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


@needs_gpu
@pytest.mark.parametrize(
    ("stored", "kv_dtype", "elements"),
    [
        ("bfloat16", None, 2**31),
        ("int8", None, 2**31),
        ("uint8", "float8_e4m3fn", 3 * 2**30),
        ("float8_e5m2", None, 2**31),
        ("uint8", "float8_e5m2", 2**32),
    ],
)
def test_write_past_2_to_31_elements(stored: str, kv_dtype: str | None, elements: int) -> None:
    """The last two pages of a large pool hold what the same tokens leave in a pool of two, and no other does."""
    shape = (8, 16, 128)
    first = elements // int(np.prod(shape)) + 3
    rng = np.random.default_rng(0)
    k, v = jnp.asarray(rng.standard_normal((2, 20, 8, 128)) * 9, jnp.bfloat16)
    slots = jnp.asarray(rng.permutation(32)[:20].astype(np.int32))

    @partial(jax.jit, static_argnums=(0, 1))
    def written(num_pages: int, at: int, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = jnp.zeros((num_pages, *shape), stored)
        pair = write.paged_write(
            pages, pages, k, v, slots, k_scale=None, v_scale=None, kv_dtype=jnp.dtype(kv_dtype or stored)
        )
        ids = jnp.array([at, at + 1, 0, num_pages // 2], jnp.int32)
        return tuple(gather.paged_gather(x, ids) for x in pair)

    large, small = written(first + 2, first, slots + first * 16), written(2, 0, slots)
    for many, few in zip(large, small, strict=True):
        np.testing.assert_array_equal(bits(many[:2]), bits(few[:2]))
        assert not bits(many[2:]).any()
