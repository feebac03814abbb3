"""A Mosaic TPU kernel broken on purpose is found out, by the comparison that the unbroken one passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_kernels.tuning import forced
from tests.pallas_kernels import merge_cases, page_cases, write_cases
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.broken_forms import broken
from tests.pallas_kernels.mosaic_checks import (
    STRICT,
    check_attention,
    check_copy,
    check_gather,
    check_merge,
    check_write,
)

PACKAGE = "pallas_kernels"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One place of one file changed: ``old``, which occurs once in module ``where``, becomes ``new``.

    ``check`` is a key of CHECKS: an operation, and a word if it has several.
    """

    name: str
    check: str
    where: str
    old: str
    new: str

    @property
    def operation(self) -> str:
        return self.check.split()[0]


def _named(cases: list[Any], name: str) -> Any:
    return next(case for case in cases if case.name == name)


# Small, but with several items and steps, some without a mask, so that every transfer matters.
ATTENTION = AttentionCase(
    "mutant",
    kv_lens=(9, 150, 100),
    query_lens=(1, 11, 1),
    block_size=16,
    k_scale="head",
    v_scale="head",
    sinks=True,
    sliding_window=60,
    holes=((1, 6),),
)
# Rows of the table in several pieces, of which every step needs some, its mask too.
TABLE = AttentionCase("table", kv_lens=(280, 20, 150), block_size=1, positions="shuffled", sliding_window=60)


def _check_attention(form: Callable[..., Any], case: AttentionCase, pages: int, *modes: Any) -> None:
    for mode in modes:
        with forced("paged_attention", decode_pages=pages, prefill_pages=pages):
            check_attention(form, case, mode)


CHECKS: dict[str, Callable[[Any], None]] = {
    "paged_gather": lambda form: check_gather(form, _named(page_cases.GATHER_CASES, "padding")),
    "paged_copy": lambda form: check_copy(form, _named(page_cases.COPY_CASES, "permutation")),
    "paged_write": lambda form: check_write(form, _named(write_cases.CASES, "e4m3-bits")),
    "merge_attention_states": lambda form: check_merge(form, _named(merge_cases.CASES, "some-unseen")),
    "paged_attention": lambda form: _check_attention(form, ATTENTION, 2, STRICT),
    "paged_attention table": lambda form: _check_attention(form, TABLE, 20, STRICT, True),
}

SHARED = "mosaic_tpu"
KERNEL = "paged_attention.mosaic_tpu_kernel"
PAGES = "paged_attention.mosaic_tpu_pages"
MEMORY = "paged_attention.mosaic_tpu_memory"
NOTHING = "from __future__ import annotations"
MUTATIONS = [
    *[Mutation(f"{name}-unbroken", name, f"{name.split()[0]}.mosaic_tpu", NOTHING, NOTHING) for name in CHECKS],
    Mutation("attention-unbroken-inside", "paged_attention", PAGES, NOTHING, NOTHING),
    *[
        Mutation(f"{name}-missing-wait", name, SHARED, "pl.when(wanted)(descriptor.wait)", "pass")
        for name in ("paged_gather", "paged_copy")
    ],
    Mutation(
        "paged_gather-last-page-left-out",
        "paged_gather",
        "paged_gather.mosaic_tpu",
        "copy_in_flight(count, copy_page",
        "copy_in_flight(count - 2, copy_page",
    ),
    Mutation(
        "paged_copy-last-page-left-out",
        "paged_copy",
        "paged_copy.mosaic_tpu",
        "copy_in_flight(count, copy",
        "copy_in_flight(count - 1, copy",
    ),
    Mutation(
        "paged_gather-padding-not-zeroed",
        "paged_gather",
        "paged_gather.mosaic_tpu",
        "zeros[...] = jnp.zeros_like(zeros)",
        "pass",
    ),
    Mutation(
        "paged_gather-page-off-by-one",
        "paged_gather",
        "paged_gather.mosaic_tpu",
        "pages.at[page]",
        "pages.at[(page + 1) % num_pages]",
    ),
    Mutation(
        "paged_copy-writes-before-reads",
        "paged_copy",
        "paged_copy.mosaic_tpu",
        "overlap = jnp.any(",
        "overlap = ~jnp.any(",
    ),
    Mutation(
        "paged_write-length-off-by-one",
        "paged_write",
        "paged_write.mosaic_tpu",
        "row < first_row + length[i]",
        "row < first_row + length[i] - 1",
    ),
    Mutation(
        "paged_write-one-row-too-many",
        "paged_write",
        "paged_write.mosaic_tpu",
        "row < first_row + length[i]",
        "row <= first_row + length[i]",
    ),
    Mutation(
        "paged_write-lost-updates-of-a-strip",
        "paged_write",
        "paged_write.mosaic_tpu",
        "@pl.when(is_new_strip)",
        "@pl.when(i >= 0)",
    ),
    Mutation(
        "paged_write-swapped-scales",
        "paged_write",
        "paged_write.mosaic_tpu",
        "values / scales[part, head]",
        "values / scales[1 - part, head]",
    ),
    Mutation(
        "paged_write-window-off-by-one",
        "paged_write",
        "paged_write.mosaic_tpu",
        "2 * rows - shift",
        "2 * rows - shift + 1",
    ),
    Mutation(
        "merge-unseen-multiplied-not-selected",
        "merge_attention_states",
        "merge_attention_states.mosaic_tpu",
        "jnp.where(share > 0, outs[state].astype(jnp.float32), 0)",
        "outs[state].astype(jnp.float32)",
    ),
    Mutation(
        "merge-last-state-left-out",
        "merge_attention_states",
        "merge_attention_states.mosaic_tpu",
        "range(outs.shape[0])",
        "range(outs.shape[0] - 1)",
    ),
    Mutation(
        "merge-weights-not-normalised",
        "merge_attention_states",
        "merge_attention_states.mosaic_tpu",
        "weights / jnp.where(total > 0, total, 1)",
        "weights",
    ),
    Mutation("attention-missing-wait-for-queries", "paged_attention", KERNEL, "self.wait_queries(index)\n", "pass\n"),
    Mutation(
        "attention-missing-wait-for-full-steps",
        "paged_attention",
        PAGES,
        "whole, whole, self.scratch.semaphores.pages.at[turn.buffer]).wait()",
        "whole, whole, self.scratch.semaphores.pages.at[turn.buffer])",
    ),
    Mutation(
        "attention-missing-wait-for-pages",
        "paged_attention",
        PAGES,
        "                    copy.wait()\n",
        "                    pass\n",
    ),
    Mutation("attention-missing-last-wait", "paged_attention", KERNEL, "self.wait_results(end - 1)", "pass"),
    Mutation(
        "attention-buffer-of-the-next-step",
        "paged_attention",
        KERNEL,
        "self.attend_pages(item, turn)",
        "self.attend_pages(item, turn._replace(count=count + 1))",
    ),
    Mutation(
        "attention-item-left-out",
        "paged_attention",
        KERNEL,
        "(core + 1) * num_items // num_cores",
        "(core + 1) * num_items // num_cores - 1",
    ),
    Mutation(
        "attention-key-too-few",
        "paged_attention",
        KERNEL,
        "(across < end), logits",
        "(across < end - 1), logits",
    ),
    Mutation(
        "attention-key-too-many",
        "paged_attention",
        KERNEL,
        "(across < end), logits",
        "(across <= end), logits",
    ),
    Mutation(
        "attention-window-off-by-one",
        "paged_attention",
        KERNEL,
        "(across >= start)",
        "(across > start)",
    ),
    Mutation(
        "attention-values-not-hidden",
        "paged_attention",
        KERNEL,
        "return logits, jnp.where((down >= lowest_start) & (down < highest_end), v, 0)",
        "return logits, v",
    ),
    Mutation(
        "attention-mask-left-out",
        "paged_attention",
        KERNEL,
        "context.position(last_key) < lowest_end",
        "context.position(last_key) < highest_end",
    ),
    Mutation(
        "attention-swapped-scales",
        "paged_attention",
        KERNEL,
        "* self.scalars.logits_scale[head]",
        "* self.scalars.v_scale[head]",
    ),
    Mutation(
        "attention-scale-of-another-head",
        "paged_attention",
        KERNEL,
        "* self.scalars.v_scale[head]",
        "* self.scalars.v_scale[0]",
    ),
    Mutation("attention-hole-read", "paged_attention", PAGES, " & (block >= 0)", ""),
    Mutation(
        "attention-missing-wait-for-the-table",
        "paged_attention table",
        PAGES,
        "self.each_table_copy(turn, lambda copy: copy.wait())",
        "pass",
    ),
    Mutation(
        "attention-piece-of-the-turn-before",
        "paged_attention table",
        PAGES,
        "entry = turn.table_buffer,",
        "entry = turn._replace(count=turn.count - 1).table_buffer,",
    ),
    Mutation(
        "attention-piece-of-another-row",
        "paged_attention table",
        PAGES,
        "row = self.scalars.items.sequence[turn.item],",
        "row = self.scalars.items.sequence[0],",
    ),
    Mutation(
        "attention-first-piece-of-every-row",
        "paged_attention table",
        PAGES,
        "pl.ds(self.piece_start(turn), self.plan.piece)",
        "pl.ds(0, self.plan.piece)",
    ),
    Mutation(
        "attention-piece-too-short",
        "paged_attention table",
        MEMORY,
        "(self.step + LANES - 1) // LANES",
        "(self.step) // LANES",
    ),
    Mutation(
        "attention-piece-overwritten-too-soon",
        "paged_attention table",
        MEMORY,
        "TABLE_BUFFERS = 4",
        "TABLE_BUFFERS = 2",
    ),
    Mutation(
        "attention-softmax-not-rescaled",
        "paged_attention",
        KERNEL,
        "scratch.values[head] * decay",
        "scratch.values[head]",
    ),
    Mutation(
        "attention-sinks-forgotten",
        "paged_attention",
        KERNEL,
        "jnp.where(self.arrays.sinks[...] > -jnp.inf, 1.0, 0.0)",
        "jnp.zeros_like(scratch.total)",
    ),
]


@pytest.fixture
def mutant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The operation's form with the mutation in it."""
    mutation: Mutation = request.param
    form, where = f"{PACKAGE}.{mutation.operation}.mosaic_tpu", f"{PACKAGE}.{mutation.where}"
    return getattr(broken(form, where, mutation.old, mutation.new, monkeypatch), mutation.operation)


UNBROKEN = [mutation for mutation in MUTATIONS if mutation.old == mutation.new]
BROKEN = [mutation for mutation in MUTATIONS if mutation.old != mutation.new]


@pytest.mark.parametrize(
    ("mutant", "check"),
    [pytest.param(m, m.check, id=m.name) for m in UNBROKEN],
    indirect=["mutant"],
)
def test_unbroken_copy_passes(mutant: Callable[..., Any], check: str) -> None:
    CHECKS[check](mutant)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [pytest.param(m, m.check, id=m.name) for m in BROKEN],
    indirect=["mutant"],
)
def test_broken_copy_is_found_out(mutant: Callable[..., Any], check: str) -> None:
    """By another result, or by the interpreter's own complaint of an access out of range."""
    with pytest.raises((AssertionError, IndexError, jax.errors.JaxRuntimeError)):
        CHECKS[check](mutant)
