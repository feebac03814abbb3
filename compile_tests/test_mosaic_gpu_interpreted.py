"""The shared table of attention cases in the GPU interpreter, with its race detector: minutes, so not a default test.

And kernels broken on purpose, each of which a case, the detector or a barrier finds out.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.pallas_kernels.broken_forms import broken
from tests.pallas_kernels.mosaic_gpu_checks import ALL, MINUTES, check

PACKAGE = "pallas_kernels.paged_attention"


@pytest.mark.parametrize("name", MINUTES)
def test_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ALL[name], monkeypatch)


class Mutation(NamedTuple):
    """``old``, which stands once in the source of module ``where``, becomes ``new``; ``case`` must tell."""

    what: str
    case: str
    old: str
    new: str
    where: str = "mosaic_gpu_kernel"


MUTATIONS = [
    Mutation("keys-not-awaited", "mixed-long", "plgpu.barrier_wait(memory.k.ready.at[slot])", "None"),
    Mutation("values-not-awaited", "mixed-long", "plgpu.barrier_wait(memory.v.ready.at[slot])", "None"),
    Mutation("used-before-it-is-free", "mixed-long", "pl.when(done >= kernel.stages)", "pl.when(done < 0)"),
    Mutation("cleaning-not-awaited", "mixed-long", "plgpu.barrier_wait(memory.cleaned.at[slot])", "None"),
    Mutation("queries-not-awaited", "mixed-long", "plgpu.barrier_wait(memory.q_ready.at[self.number])", "None"),
    Mutation("arrival-lost", "mixed-long", "plgpu.barrier_arrive(memory.v.used.at[slot])", "None"),
    Mutation("never-cleaned", "mixed-long", "pl.when(masked)(lambda: self.clean(slot))", "None"),
    Mutation(
        "cleaned-one-key-short", "mixed-long", "(position < self.tile.last_seen)", "(position <= self.tile.last_seen)"
    ),
    Mutation("sees-the-next-token", "mixed", "position < down_rows(self.end", "position <= down_rows(self.end"),
    Mutation("window-too-narrow", "window-7", "position >= down_rows(self.start", "position > down_rows(self.start"),
    Mutation("never-masked", "mixed", "lambda x: self.mask(x, slot)", "lambda x: x"),
    Mutation("scales-swapped", "k-scale-head", "factor=given.factors[0,", "factor=given.factors[1,"),
    Mutation("sign-ignored", "mosaic-gpu-negative-scale", "pl.when(self.factor < 0)(self.negate_queries)", "None"),
    Mutation("scale-of-0", "mosaic-gpu-scale-of-0", "_SMALLEST = 1e-30", "_SMALLEST = 0.0"),
    Mutation("output-not-scaled", "v-scale-head", "factor / softmax.total", "1 / softmax.total"),
    Mutation("cap-in-base-2", "soft-cap", "(factor * (2 * LOG2_E) / cap)", "(factor * 2 / cap)"),
    Mutation("lse-in-base-2", "mixed", "base * (1 / LOG2_E)", "base"),
    Mutation("values-not-decayed", "mixed-long", "softmax.values * down_rows(decay, values.shape)", "softmax.values"),
    Mutation("holes-read", "holes", "mine & (page < 0)", "mine & (page < -1)"),
    Mutation("positions-ignored", "shuffled-holes", "positions + base, -1", "positions, -1"),
    Mutation("rank-ignored", "context-3-2-4", "_one(given.rank, 0)", "0"),
    Mutation(
        "all-64-rows-stored", "mixed", "@pl.loop(self.first_row, self.last_row)", "@pl.loop(self.first_row, ROWS)"
    ),
    Mutation(
        "whole-steps-too-many",
        "prefill-two-tiles",
        ".block_size) // keys\n",
        ".block_size) // keys + 1\n",
        "mosaic_gpu_tiles",
    ),
    Mutation(
        "last-step-lost", "prefill-two-tiles", "-(-high // keys), first)", "high // keys, first)", "mosaic_gpu_tiles"
    ),
    Mutation(
        "holes-overlooked",
        "holes-long",
        "first, jnp.maximum(last, first))",
        "jnp.maximum(last, first), jnp.maximum(last, first))",
        "mosaic_gpu_tiles",
    ),
    Mutation(
        "lse-of-other-tokens", "prefill-chunked", "row % WARPGROUP_ROWS", "row % WARPGROUP_ROWS + 1", "mosaic_gpu"
    ),
]

# What a race, a barrier that nobody completes or a missed phase of one is called by the detector and the interpreter.
FOUND = ("raced for", "RACE DETECTED", "waited for a barrier", "did not observe", "was observed", "differ", "aborted")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_broken_kernel_is_found_out(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"{PACKAGE}.{mutation.where}"
    form = broken(f"{PACKAGE}.mosaic_gpu", where, mutation.old, mutation.new, monkeypatch).paged_attention
    with pytest.raises(Exception, match="|".join(FOUND)):  # of whatever class the interpreter makes of it
        check(ALL[mutation.case], monkeypatch, form)
