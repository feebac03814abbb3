"""Whatever the size of the pool, an offset that a Triton kernel computes has bits enough to reach all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice

from pallas_kernels import paged_attention, paged_copy, paged_gather, paged_write
from pallas_kernels.interpret import interpret_pallas
from tests.pallas_kernels.triton_ir import A100, H100, offsets

array = jax.ShapeDtypeStruct
KV_HEADS, BLOCK_SIZE, HEAD_DIM = 8, 16, 128
PAGE = KV_HEADS * BLOCK_SIZE * HEAD_DIM
# Around the sizes at which 31 and 32 bits are no longer enough, in bytes.
SIZES = {"2-GiB": 2**31, "2-GiB-and-a-page": 2**31 + PAGE, "3-GiB": 3 * 2**30, "4-GiB": 2**32, "6-GiB": 6 * 2**30}
FORMATS: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, None),
    "e4m3": (jnp.float8_e4m3fn, None),
    "e5m2-bits": (jnp.uint8, jnp.float8_e5m2),
    "bfloat16": (jnp.bfloat16, None),
}


def pool(size: int, dtype: Any, page: tuple[int, ...] = (KV_HEADS, BLOCK_SIZE, HEAD_DIM)) -> Any:
    """``size`` bytes of pages or a page more."""
    page_bytes = page[0] * page[1] * page[2] * jnp.dtype(dtype).itemsize
    return array((-(-size // page_bytes), *page), dtype)


def attend(pages: Any, kv_dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A mixed batch: both kernels, decode and prefill."""
    given = array((512, 32, HEAD_DIM), jnp.bfloat16), pages, pages, array((8, 64), jnp.int32), array((8,), jnp.int32)
    call = lambda *x: paged_attention(*x, kv_dtype=kv_dtype, implementation="triton")  # noqa: E731
    return call, (*given, array((9,), jnp.int32))


def write(pages: Any, kv_dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    token = array((64, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    call = lambda *x: paged_write(*x, kv_dtype=kv_dtype, implementation="triton")  # noqa: E731
    return call, (pages, pages, token, token, array((64,), jnp.int32))


def move(pages: Any, kv_dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def call(pages: Any, ids: Any) -> Any:
        copied = paged_copy(pages, ids, ids + 1, implementation="triton")
        return copied, paged_gather(copied, ids, implementation="triton")

    return call, (pages, array((64,), jnp.int32))


OPERATIONS = {"attention": attend, "write": write, "move": move}


@pytest.mark.parametrize("kv_format", list(FORMATS))
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_offsets_reach_all_of_the_pool(operation: str, size: str, kv_format: str) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    pages = pool(SIZES[size], storage)
    function, arguments = OPERATIONS[operation](pages, kv_dtype)
    found = offsets(function, *arguments)
    assert [offset for offset in found if not offset.reaches_all] == []
    of_pages = [offset for offset in found if offset.size * 4 >= pages.size]
    assert len(of_pages) >= 2
    assert {offset.bits for offset in of_pages} == {64 if pages.size * pages.dtype.itemsize > 2**32 else 32}


@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.device_kind)
@pytest.mark.parametrize("kv_format", ["e4m3", "e5m2-bits"])
def test_also_where_fp8_is_converted_by_hand(kv_format: str, device: AbstractDevice) -> None:
    storage, kv_dtype = FORMATS[kv_format]
    for operation in (attend, write):
        function, arguments = operation(pool(SIZES["3-GiB"], storage), kv_dtype)
        found = offsets(function, *arguments, device=device)
        assert found
        assert all(offset.reaches_all for offset in found)


def test_pages_move_as_the_widest_words_they_are_made_of() -> None:
    for page, in_a_word in (((1, 1, 12), 4), ((1, 3, 10), 2)):
        pages = pool(3 * 2**30, jnp.uint8, page)
        function, arguments = move(pages, None)
        found = offsets(function, *arguments)
        assert pages.size // in_a_word in {offset.size for offset in found}
        assert all(offset.reaches_all for offset in found)


def test_rows_of_an_odd_number_of_bytes_are_refused_only_where_they_cannot_be_reached() -> None:
    odd = (KV_HEADS, BLOCK_SIZE, HEAD_DIM + 1)
    for size in (2**30, 3 * 2**30, 5 * 2**30):
        for operation, page in ((attend, odd), (write, odd), (move, (1, 1, HEAD_DIM + 1))):
            function, arguments = operation(pool(size, jnp.int8, page), None)
            if size == 3 * 2**30:
                with pytest.raises(NotImplementedError, match="only two by two"):
                    offsets(function, *arguments)
            else:
                assert all(offset.reaches_all for offset in offsets(function, *arguments))


def test_an_odd_number_is_written_into_even_rows_only_where_it_can_be_reached() -> None:
    pages, token = pool(3 * 2**30, jnp.int8), array((64, KV_HEADS, 5), jnp.bfloat16)
    with interpret_pallas(), pytest.raises(NotImplementedError, match="even number of them in a row, not 5"):
        jax.eval_shape(
            lambda *x: paged_write(*x, implementation="triton"), pages, pages, token, token, array((64,), jnp.int32)
        )
