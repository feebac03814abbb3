"""The Triton forms of gather, copy, write and merge: interpreted here, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.pallas_kernels.gpu import needs_gpu
from tests.pallas_kernels.triton_checks import check_copy, check_gather, check_merge, check_write

IDS = [3, -1, 5, 5, 99, -7, 0, 10, 2**31 - 1]
CHAIN = ([0, 1, 2, 3, 4, -1, 5, 6, 7, 99], [1, 2, 0, 8, -1, 9, 5, 7, 10, 3])
SLOTS = [3, -1, 39, 40, -9, 12, 0]
RUNS = [(3, 2, 3), (-1, 0, 1), (20, 0, 2), (30, 1, 0)]
RUN_SLOTS = [20, 21, 3, 4, 5, -1, -1]  # the same, a slot a token

CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"gather-{dtype}-{'x'.join(map(str, shape))}": lambda shape=shape, dtype=dtype: check_gather(
            gather.paged_gather, shape, dtype, IDS
        )
        for shape, dtype in (
            ((11, 3, 8, 20), "float32"),
            ((11, 2, 16, 64), "bfloat16"),
            ((11, 2, 8, 80), "float8_e4m3fn"),
            ((11, 1, 1, 3), "int8"),
            ((11, 1, 256, 128), "uint16"),
        )
    },
    "gather-nothing": lambda: check_gather(gather.paged_gather, (4, 1, 8, 16), "float32", []),
    "gather-only-padding": lambda: check_gather(gather.paged_gather, (4, 1, 8, 16), "float32", [-1, -1]),
    **{
        f"copy-{name}-{dtype}": lambda pairs=pairs, dtype=dtype: check_copy(
            copy.paged_copy, (11, 3, 8, 20), dtype, *pairs
        )
        for name, pairs, dtype in (
            ("chain", CHAIN, "float32"),
            ("chain", CHAIN, "bfloat16"),
            ("permutation", (list(range(11)), [4, 0, 8, 1, 10, 2, 9, 3, 7, 5, 6]), "uint8"),
            ("apart", ([0, 0, 1], [5, 6, 7]), "float8_e5m2"),
            ("onto-itself", ([2, 3], [2, 4]), "int8"),
            ("nothing", ([], []), "float32"),
        )
    },
    "write": lambda: check_write(write.paged_write, SLOTS),
    "write-one-token": lambda: check_write(write.paged_write, [17]),
    "write-nothing": lambda: check_write(write.paged_write, []),
    "write-runs": lambda: check_write(write.paged_write, RUN_SLOTS, runs=RUNS),
    "write-storage-padded": lambda: check_write(write.paged_write, SLOTS, heads=3, dims=(96, 80)),
    "write-bfloat16": lambda: check_write(
        write.paged_write, SLOTS, kv_dtype="bfloat16", stored_as="uint16", values_dtype="bfloat16"
    ),
    "write-float16-from-bfloat16": lambda: check_write(
        write.paged_write, SLOTS, kv_dtype="float16", values_dtype="bfloat16"
    ),
    "write-int8": lambda: check_write(
        write.paged_write, SLOTS, kv_dtype="int8", scales=(np.float32(0.7), np.float32([0.3, 1.0]))
    ),
    "write-int8-runs-as-uint8": lambda: check_write(
        write.paged_write,
        RUN_SLOTS,
        runs=RUNS,
        kv_dtype="int8",
        stored_as="uint8",
        scales=(np.float32([0.2, 2.0]), np.float32(1.5)),
    ),
    "write-e4m3": lambda: check_write(
        write.paged_write, SLOTS, kv_dtype="float8_e4m3fn", stored_as="uint8", scales=(None, np.float32(0.01))
    ),
    "write-e5m2": lambda: check_write(
        write.paged_write, SLOTS, kv_dtype="float8_e5m2", scales=(np.float32([3.0, 0.001]), None)
    ),
    "merge-one": lambda: check_merge(merge.merge_attention_states, (1, 4, 3, 16)),
    "merge-many": lambda: check_merge(merge.merge_attention_states, (5, 7, 3, 80)),
    "merge-bfloat16": lambda: check_merge(merge.merge_attention_states, (3, 40, 2, 128), "bfloat16"),
    "merge-one-number": lambda: check_merge(merge.merge_attention_states, (2, 5, 4, 1)),
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
