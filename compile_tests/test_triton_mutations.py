"""A Triton kernel broken on purpose is found out, by the comparison that the unbroken one passes. Interpreted."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest

from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.tuning import forced
from tests.pallas_kernels import attention_cases, merge_cases, page_cases, write_cases
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.broken_forms import broken
from tests.pallas_kernels.form_checks import (
    SMALL_TILES,
    check_attention,
    check_copy,
    check_gather,
    check_merge,
    check_write,
)

CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "paged_gather": check_gather,
    "paged_copy": check_copy,
    "paged_write": check_write,
    "merge_attention_states": check_merge,
    "paged_attention": check_attention,
}
SPLIT = AttentionCase("split-sinks", kv_lens=(90, 3), sinks=True)
WINDOW = AttentionCase("window-tiles", kv_lens=(90,), query_lens=(70,), sliding_window=33)
TRIMMED = AttentionCase("trimmed-rows", kv_lens=(90,), query_lens=(70,), sliding_window=9, positions="trimmed")
CASES: dict[str, dict[str, Any]] = {
    "paged_gather": {case.name: case for case in page_cases.GATHER_CASES},
    "paged_copy": {case.name: case for case in page_cases.COPY_CASES},
    "paged_write": {case.name: case for case in write_cases.CASES},
    "merge_attention_states": {case.name: case for case in merge_cases.CASES},
    "paged_attention": {case.name: case for case in (*attention_cases.CASES, SPLIT, WINDOW, TRIMMED)},
}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``old``, which stands once in the source of module ``where``, becomes ``new``; ``case`` must tell."""

    operation: str
    what: str
    case: str
    old: str
    new: str
    where: str = "triton"

    def __str__(self) -> str:
        return f"{self.operation}-{self.what}"


def _attention(what: str, case: str, old: str, new: str, where: str = "triton_kernel") -> Mutation:
    return Mutation("paged_attention", what, case, old, new, where)


MUTATIONS = [
    Mutation(
        "paged_gather", "padding-reads-page-0", "padding", "mask=jnp.full(piece, inside)", "mask=jnp.full(piece, True)"
    ),
    Mutation("paged_gather", "wrong-page", "permutation", "page = ids[entry]", "page = ids[0 * entry]"),
    Mutation("paged_gather", "one-piece-only", "real-page", "pl.ds(pl.program_id(1) * piece", "pl.ds(0 * piece"),
    Mutation("paged_copy", "reads-after-writes", "chain-forward", "set_aside[entry] >= 0", "set_aside[entry] > 99"),
    Mutation("paged_copy", "sets-aside-the-wrong-page", "swap", "page = ids[entry]", "page = ids[0 * entry]"),
    Mutation(
        "paged_copy", "source-and-target-swapped", "fan-out", "pages[page, columns]", "pages[dst[entry], columns]"
    ),
    Mutation("paged_copy", "ignores-bad-targets-only", "outside-the-pool", "(src == size) | ", ""),
    Mutation("paged_write", "padding-is-written", "padding", "(slot >= 0) & (entry < capacity)", "entry < capacity"),
    Mutation(
        "paged_write",
        "past-the-pool-goes-to-slot-0",
        "outside-the-pool",
        "jnp.where(inside, slots, -1)",
        "jnp.where(inside, slots, 0)",
    ),
    Mutation("paged_write", "scales-swapped", "int8-per-head", "(k_scale, v_scale))", "(v_scale, k_scale))"),
    Mutation("paged_write", "scale-multiplied", "scale-tensor", "numbers / scale", "numbers * scale"),
    Mutation(
        "paged_write", "offset-off-by-one", "random-slots", "lax.rem(slot, block_size)", "lax.rem(slot + 1, block_size)"
    ),
    Mutation("paged_write", "last-tokens-forgotten", "random-slots", "pl.cdiv(capacity, tokens)", "capacity // tokens"),
    Mutation("paged_write", "runs-in-token-order", "runs-out-of-order", "at if rows is None else rows[at]", "at"),
    Mutation(
        "merge_attention_states",
        "nan-multiplied-by-0",
        "some-unseen",
        "jnp.where((weight > 0)[:, None], ",
        "jnp.where(True, ",
    ),
    Mutation(
        "merge_attention_states", "infinity-counts", "plus-infinity", "jnp.abs(value) < jnp.inf", "value == value"
    ),
    Mutation("merge_attention_states", "base-forgotten", "three", "base + jnp.log(total)", "jnp.log(total)"),
    Mutation(
        "merge_attention_states",
        "not-normalised",
        "three",
        "(value / jnp.where(total > 0, total, 1.0)[:, None])",
        "(value)",
    ),
    Mutation(
        "merge_attention_states",
        "last-state-forgotten",
        "two",
        "fori_loop(0, states, add",
        "fori_loop(0, states - 1, add",
    ),
    _attention("one-key-too-many", "decode", "(position < self.last_seen)", "(position <= self.last_seen)"),
    _attention("one-key-too-few", "decode", "(position < self.last_seen)", "(position < self.last_seen - 1)"),
    _attention("sees-the-next-token", "mixed", "keys.position < tile.end", "keys.position <= tile.end"),
    _attention("window-too-narrow", "window-7", "keys.position >= tile.start", "keys.position > tile.start"),
    _attention(
        "window-not-masked",
        "window-tiles",
        "tile, first, start, softmax, masked=True",
        "tile, first, start, softmax, masked=False",
    ),
    _attention(
        "end-not-masked", "mixed", "tile, end, last, softmax, masked=True", "tile, end, last, softmax, masked=False"
    ),
    _attention(
        "steps-of-all-rounded-up",
        "prefill-two-tiles",
        "lax.div(self.context.local_length(self.all_end), self",
        "lax.div(self.context.local_length(self.all_end) + 15, self",
    ),
    _attention(
        "holes-read", "holes", "(page >= 0) & (page < given.k_pages.shape[0])", "(page < given.k_pages.shape[0])"
    ),
    _attention(
        "positions-ignored",
        "shuffled",
        "base + self.context.position(offset), -1)",
        "self.context.position(local), -1)",
    ),
    _attention("unread-not-zeroed", "decode", "jnp.where(mask, at[...], jnp.zeros((), pages.dtype))", "at[...]"),
    _attention(
        "heads-mixed-up", "mixed", "lax.rem(row, kernel.group)", "(kernel.group - 1 - lax.rem(row, kernel.group))"
    ),
    _attention(
        "query-off-by-one", "mixed", "position = first_position + query", "position = first_position + query + 1"
    ),
    _attention("old-values-not-decayed", "decode-long", "value * decay[:, None] +", "value +"),
    _attention("old-total-not-decayed", "decode-long", "softmax.total * decay +", "softmax.total +"),
    _attention("lse-in-base-2", "mixed", "base * (1 / LOG2_E)", "base"),
    _attention("cap-in-base-2", "soft-cap", "(2 * LOG2_E / cap)", "(2 / cap)"),
    _attention("scales-swapped", "k-scale-head", "given.factors[0, tile.kv_head]", "given.factors[1, tile.kv_head]"),
    _attention("output-not-scaled", "v-scale-head", "given.factors[1, tile.kv_head] /", "1 /"),
    _attention("splits-overlap", "split-sinks", "return start, jnp.minimum(start + steps, last)", "return start, last"),
    _attention("split-lost", "split-sinks", "first + tile.split * steps", "first + (tile.split + 1) * steps"),
    _attention(
        "every-split-counts-the-sink", "split-sinks", "counted &= tile.split == 0", "counted &= tile.split >= 0"
    ),
    _attention(
        "sink-before-the-start", "sinks-decode", "counted = tile.position >= 0", "counted = tile.position >= -9"
    ),
    _attention("rank-ignored", "context-2-1-1", "else given.rank[0]", "else 0"),
    _attention("k-scale-forgotten", "k-scale-head", "of_logits * per_head(k_scale)", "of_logits", "triton"),
    _attention("short-rows-dropped", "mixed", "token = jnp.where(mine,", "token = jnp.where(mine & False,", "triton"),
    _attention("padding-not-zeroed", "mixed-padding-tokens", "tokens - end])", "0 * end])", "triton_items"),
    _attention(
        "columns-of-the-first-row-alone",
        "shuffled",
        "last_row // group, kv_len)",
        "first_row // group, kv_len)",
        "triton_items",
    ),
    _attention(
        "columns-of-the-last-row-alone",
        "trimmed-rows",
        "first_row // group, kv_len)",
        "last_row // group, kv_len)",
        "triton_items",
    ),
    _attention(
        "last-column-lost",
        "shuffled-decode",
        "self.columns[1] * self.block_size",
        "self.columns[1] * self.block_size - 16",
    ),
    _attention(
        "first-column-lost",
        "shuffled-decode",
        "self.columns[0] * self.block_size",
        "self.columns[0] * self.block_size + 16",
    ),
    _attention(
        "second-tile-lost",
        "prefill-two-tiles",
        "-(-(lead + query_len) * group // rows)",
        "jnp.minimum(query_len, 1)",
        "triton_items",
    ),
]


def check(form: Any, operation: str, case: str) -> None:
    with interpret_pallas(), forced("paged_attention", **SMALL_TILES), forced("paged_gather", words=512):
        CHECKS[operation](form, CASES[operation][case])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_case_tells(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"pallas_kernels.{mutation.operation}"
    form = broken(f"{package}.triton", f"{package}.{mutation.where}", mutation.old, mutation.new, monkeypatch)
    with pytest.raises(AssertionError):
        check(getattr(form, mutation.operation), mutation.operation, mutation.case)


@pytest.mark.parametrize(
    ("operation", "case"),
    sorted(
        {(mutation.operation, mutation.case) for mutation in MUTATIONS}
        - {
            ("paged_attention", case.name)
            for case in attention_cases.CASES  # test_triton_attention runs those
        }
    ),
)
def test_the_unbroken_form_passes(operation: str, case: str) -> None:
    form = getattr(importlib.import_module(f"pallas_kernels.{operation}.triton"), operation)
    check(form, operation, case)
