"""Fill the table of kernel parameters on the device that is here.

    python -m benchmarks.tune [--only WORD ...] [--table FILE]

Each case is run once to learn which entry of the table its form asks for. Cases that share an entry (a small batch of
long sequences, a large one of short) are then run with every combination of the values below; the one with the least
time relative to the heuristic, on average, goes into the table, if it wins by more than the noise. What does not
compile is no candidate. Entries of other devices stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.kernel_calls import attention_us, copy_us, gather_us, merge_us, write_us
from benchmarks.kernel_inputs import BLOCK_SIZE, Sizes, pages_to_move, states_to_merge, stored_head_dim
from pallas_kernels import tuning
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape

Space = dict[str, list[int]]
NOISE = 0.02

# Values to try, by operation and what is tuned of it, for GPUs and TPUs. What a form has no parameter for is left out.
SPACES: dict[str, Space] = {
    "paged_gather": {"words": [1024, 2048, 4096, 8192], "num_warps": [4, 8], "in_flight": [4, 8, 16, 32, 64]},
    "paged_copy": {"words": [1024, 2048, 4096, 8192], "num_warps": [4, 8], "in_flight": [4, 8, 16, 32, 64]},
    "paged_write": {"tokens": [1, 2, 4, 8], "num_warps": [2, 4, 8], "strip_rows": [16, 32, 64, 128, 256]},
    "merge_attention_states": {
        "numbers": [512, 1024, 2048, 4096],
        "num_warps": [2, 4, 8],
        "rows": [128, 256, 512, 1024, 2048],
    },
    "paged_attention decode": {
        "decode_keys": [16, 32, 64, 128],
        "decode_warps": [2, 4, 8],
        "decode_stages": [2, 3, 4, 5],
        "programs_per_core": [2, 4, 8],
        "decode_pages": [4, 8, 16, 32, 64, 128],
    },
    "paged_attention prefill": {
        "prefill_rows": [64, 128],
        "prefill_keys": [32, 64, 128],
        "prefill_warps": [4, 8],
        "prefill_stages": [2, 3, 4],
        "prefill_pages": [8, 16, 32, 64],
        "prefill_queries": [32, 64, 128, 256],
        "take_turns": [0, 1],
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement that decides one entry of the table; ``space`` names its values in ``SPACES``."""

    name: str
    space: str
    measure: Callable[[], float]

    @property
    def operation(self) -> str:
        return self.space.split()[0]


def cases(sizes: Sizes) -> Iterator[Case]:
    """Every operation, at every named shape. Arrays are made when a case is measured, and go after."""
    for name in dict.fromkeys(("Llama-3-8B", *sizes.names)):
        shape = SHAPES[name]
        yield Case(f"gather {name}", "paged_gather", lambda shape=shape: _gather(sizes, shape))
        yield Case(f"copy {name}", "paged_copy", lambda shape=shape: _copy(sizes, shape))
        for stored, kv_dtype in ((jnp.bfloat16, None), (jnp.uint8, jnp.float8_e4m3fn)):
            pages_shape = (max(sizes.written_tokens) // 8, shape.kv_heads, BLOCK_SIZE, stored_head_dim(shape))
            for tokens in sizes.written_tokens:
                write = partial(write_us, pages_shape, tokens, stored, kv_dtype)
                yield Case(f"write {name} {tokens} {jnp.dtype(stored)}", "paged_write", write)
    for states in (2, 4, 8, 16):
        merge = lambda states=states: merge_us(*states_to_merge(sizes, states))  # noqa: E731
        yield Case(f"merge {states}", "merge_attention_states", merge)
    for name, make in sizes.attention_cases():
        if make.__name__ != "mixed":
            attend = lambda shape=SHAPES[name], make=make: attention_us(shape, make(shape))  # noqa: E731
            yield Case(f"{make.__name__} {name}", f"paged_attention {make.__name__}", attend)
        if make.__name__ == "prefill":  # by name, as nothing else chooses it
            form = lambda shape=SHAPES[name], make=make: attention_us(shape, make(shape), implementation="mosaic_gpu")  # noqa: E731
            yield Case(f"prefill {name} mosaic_gpu", "paged_attention prefill", form)


def _gather(sizes: Sizes, shape: AttentionShape) -> float:
    pages, ids = pages_to_move(sizes, shape)
    return gather_us(pages, ids[: len(ids) // 2])


def _copy(sizes: Sizes, shape: AttentionShape) -> float:
    pages, ids = pages_to_move(sizes, shape)
    return copy_us(pages, *ids.reshape(2, -1))


def question_of(case: Case) -> tuning.Asked | None:
    """What the case's own operation asks the table; None where no form with parameters runs."""
    with tuning.recorded() as asked:
        try:
            case.measure()
        except NotImplementedError as error:
            print(f"{case.name}: {error}")
            return None
    return next((one for one in asked if one.operation == case.operation), None)


def tune(cases: list[Case], question: tuning.Asked) -> dict[str, int]:
    """What the entry shared by ``cases`` should hold: empty, if nothing beats the heuristic."""
    operation = question.operation
    space = {name: values for name, values in SPACES[cases[0].space].items() if name in question.heuristic}
    with tuning.forced(operation, **{name: question.heuristic[name] for name in space}):
        by_rule = [case.measure() for case in cases]
    scores: dict[tuple[int, ...], float] = {tuple(question.heuristic[name] for name in space): 1.0 - NOISE}
    for values in itertools.product(*space.values()):
        candidate = dict(zip(space, values, strict=True))
        try:
            with tuning.forced(operation, **candidate):
                times = [case.measure() for case in cases]
        except Exception as error:
            print(f"  {candidate}: {type(error).__name__}")
            continue
        score = statistics.mean(us / rule for us, rule in zip(times, by_rule, strict=True))
        scores[values] = min(score, scores.get(values, score))
    best = dict(zip(space, min(scores, key=lambda values: scores[values]), strict=True))
    print(f"{', '.join(case.name for case in cases)}: {best}, {min(scores.values()):.3f} of the time by rule")
    return {} if all(question.heuristic[name] == value for name, value in best.items()) else best


def put(table: dict, question: tuning.Asked, chosen: dict[str, int], tuned: Space) -> None:
    """The entry, with what was tuned before of other parameters of the same shape."""
    place = table
    for name in (question.operation, question.implementation, question.device_kind):
        place = place.setdefault(name, {})
    kept = {name: value for name, value in place.get(question.key, {}).items() if name not in tuned}
    place[question.key] = {**kept, **chosen}
    if not place[question.key]:
        del place[question.key]


def main() -> None:
    """Tune, print, write after every entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="words: cases whose name has one of them")
    parser.add_argument("--table", type=Path, default=tuning.TABLE, help="the file to refill")
    arguments = parser.parse_args()
    groups: dict[tuple[str, tuning.Asked], list[Case]] = {}
    for case in cases(Sizes.for_platform(jax.default_backend())):
        if arguments.only and not any(word in case.name for word in arguments.only):
            continue
        question = question_of(case)
        if question is None:
            print(f"{case.name}: nothing to tune on {jax.devices()[0].device_kind}")
        else:
            groups.setdefault((case.space, question), []).append(case)
    table = json.loads(arguments.table.read_text()) if arguments.table.exists() else {}
    for (space, question), group in groups.items():
        put(table, question, tune(group, question), SPACES[space])
        arguments.table.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
