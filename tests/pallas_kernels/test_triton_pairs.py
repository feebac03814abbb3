"""One-byte pages read and written two by two, as between 2 and 4 GiB: forced here on the small ones of the cases."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_numbers
from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.nvidia import target_gpu
from pallas_kernels.paged_attention import triton as attention_form
from pallas_kernels.paged_write import triton as write_form
from pallas_kernels.triton_numbers import join_pairs, split_pairs
from pallas_kernels.tuning import forced
from pallas_kernels.words import as_pairs, as_words, from_words
from tests.pallas_kernels import attention_cases, write_cases
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.broken_forms import load
from tests.pallas_kernels.form_checks import SMALL_TILES, check_attention, check_write
from tests.pallas_kernels.gpu import needs_gpu
from tests.pallas_kernels.stored_numbers import logical
from tests.pallas_kernels.write_cases import WriteCase

Case = AttentionCase | WriteCase
MIXED: dict[str, Any] = {"kv_lens": (5, 33, 20, 64, 16), "query_lens": (5, 1, 20, 3, 1)}
MORE: list[Case] = [
    AttentionCase("pairs-head-dim-80", head_dim=80, kv_dtype="float8_e5m2", k_scale="head", **MIXED),
    AttentionCase("pairs-splits", kv_lens=(9, 300, 150), block_size=16, kv_dtype="int8", v_scale="head"),
    AttentionCase(
        "pairs-storage-padded", kv_dtype="float8_e4m3fn", storage_head_dim=42, v_head_dim=48, v_storage_head_dim=50,
        q_dtype="bfloat16", stored_as="uint8", **MIXED
    ),
    WriteCase("pairs-head-dim-80", head_dim=80, v_head_dim=6, storage_head_dim=80, kv_dtype="int8", kv_heads=3),
    WriteCase("pairs-runs", slots=None, runs=((2, 0, 5), (20, 5, 3), (9, 8, 3)), kv_dtype="float8_e5m2"),
]  # fmt: skip


def can(case: Case) -> bool:
    """Whether it is of one-byte pages, and of sizes that Triton takes, two by two."""
    sizes = case.head_dim, case.v_head_dim or case.head_dim
    multiple = 2 if isinstance(case, WriteCase) else 16
    return logical(case.kv_dtype).itemsize == 1 and all(size % multiple == 0 for size in sizes)


CASES = {
    f"{'write' if isinstance(case, WriteCase) else 'attention'}-{case.name}": case
    for case in (*attention_cases.CASES, *write_cases.CASES, *MORE)
    if can(case)
}


class Forms(NamedTuple):
    """The modules of two Triton forms made afresh, which take any one-byte pages for ones they cannot reach."""

    attention: ModuleType
    write: ModuleType

    def check(self, name: str) -> None:
        case = CASES[name]
        if isinstance(case, WriteCase):
            check_write(self.write.paged_write, case)
        else:
            check_attention(self.attention.paged_attention, case)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forms]:
    sources = {"fresh_attention": attention_form, "fresh_write": write_form}
    forms = Forms(*(load(inspect.getsource(form), name, monkeypatch) for name, form in sources.items()))
    for module in (triton_numbers, forms.write):
        monkeypatch.setattr(module, "overflows_offsets", lambda pages: pages.dtype.itemsize == 1)
    with forced("paged_attention", **SMALL_TILES):
        yield forms


@pytest.mark.parametrize("name", list(CASES))
def test_against_numpy_interpreted(name: str, forms: Forms) -> None:
    with interpret_pallas():
        forms.check(name)


@needs_gpu
@pytest.mark.parametrize("name", list(CASES))
def test_against_numpy_on_a_gpu(name: str, forms: Forms) -> None:
    forms.check(name)


@pytest.mark.parametrize("name", ["attention-pairs-storage-padded", "write-e4m3-bits"])
def test_where_fp8_is_converted_by_hand(name: str, forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in forms:
        monkeypatch.setattr(module, "target_gpu", lambda: dataclasses.replace(target_gpu(), capability=80))
    with interpret_pallas():
        forms.check(name)


def swapped(words: jax.Array) -> jax.Array:
    return (words >> jnp.uint16(8)) | (words << jnp.uint16(8))


def test_bytes_read_in_the_wrong_order_are_found_out(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_numbers, "split_pairs", lambda words: split_pairs(swapped(words)))
    with interpret_pallas(), pytest.raises(AssertionError):
        forms.check("attention-pairs-splits")


def test_bytes_written_in_the_wrong_order_are_found_out(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.write, "join_pairs", lambda bits: swapped(join_pairs(bits)))
    with interpret_pallas(), pytest.raises(AssertionError):
        forms.check("write-pairs-runs")


def test_words_and_back() -> None:
    pages = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6)).astype(np.uint8)
    pairs = as_pairs(jnp.asarray(pages))
    np.testing.assert_array_equal(pairs, pages.view("<u2"))
    np.testing.assert_array_equal(split_pairs(pairs), pages)
    np.testing.assert_array_equal(join_pairs(jnp.asarray(pages)), pairs)
    for shape, words in (((3, 4, 6), "<u4"), ((3, 1, 6), "<u2"), ((3, 1, 5), "u1")):
        given = np.ascontiguousarray(np.resize(pages, (5, *shape)))
        moved = as_words(jnp.asarray(given))
        np.testing.assert_array_equal(moved, given.reshape(5, -1).view(words))
        np.testing.assert_array_equal(from_words(moved, given.shape, jnp.dtype(jnp.uint8)), given)
