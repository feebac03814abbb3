"""The demo's second table: prompts that begin alike, once with and once without the prefix cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.generate import GenerationResult, serve
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.token_equality import Comparison, compare_tokens


@dataclasses.dataclass(frozen=True)
class PrefixSizes:
    """What is served.

    Attributes:
        num_prompts: requests, all waiting at the start.
        shared_tokens: that all of them begin with, as with a system prompt.
        own_tokens: shortest and longest rest; the others lie evenly between.
        output_tokens: generated for each.
        repeats: timed runs of each engine, in turn; the one with the shortest time to the first token counts.
    """

    num_prompts: int = 24
    shared_tokens: int = 400
    own_tokens: tuple[int, int] = (8, 48)
    output_tokens: int = 24
    repeats: int = 2


@dataclasses.dataclass(frozen=True)
class PrefixRun:
    """One engine's run over all prompts.

    Attributes:
        results: one a prompt.
        num_computed: prompt tokens that went through the model.
        num_cached: tokens that did not have to.
        first_token_seconds: from the start to a request's first token, mean over the requests.
        tokens_per_second: generated, prefill included.
    """

    results: list[GenerationResult]
    num_computed: int
    num_cached: int
    first_token_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class PrefixReport:
    """Both runs, and whether they gave the same tokens."""

    without: PrefixRun
    cached: PrefixRun
    comparison: Comparison


def prefix_traffic(tokens: Sequence[int], sizes: PrefixSizes) -> list[list[int]]:
    """Prompts cut from ``tokens``: the same beginning, and a rest of its own for each."""
    shared, rest = list(tokens[: sizes.shared_tokens]), list(tokens[sizes.shared_tokens :])
    lengths = np.linspace(*sizes.own_tokens, sizes.num_prompts).astype(int)
    starts = np.linspace(0, len(rest) - max(sizes.own_tokens), sizes.num_prompts).astype(int)
    return [shared + rest[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def compare_prefix_caching(
    without: Engine, cached: Engine, prompts: list[list[int]], sizes: PrefixSizes
) -> PrefixReport:
    """Serve ``prompts`` through two warm engines, the second of which has a prefix cache, empty at the start."""
    engines, runs = (without, cached), []
    for _ in range(sizes.repeats):  # in turn, so that a busy machine is unfair to neither
        runs.append([_run(engine, prompts, sizes.output_tokens) for engine in engines])
    plain, shared = (min(each, key=lambda run: run.first_token_seconds) for each in zip(*runs, strict=True))

    def regenerate(known: list[list[int]], max_tokens: list[int]) -> list[GenerationResult]:
        return serve(cached, known, [SamplingParams(max_tokens=n, ignore_eos=True) for n in max_tokens])

    return PrefixReport(plain, shared, compare_tokens(prompts, plain.results, shared.results, regenerate))


def _run(engine: Engine, prompts: list[list[int]], output_tokens: int) -> PrefixRun:
    engine.backend.reset_prefix_cache()
    stats = engine.scheduler.stats
    first: dict[int, float] = {}  # index of a prompt -> seconds
    computed, cached = stats.num_computed_prompt_tokens, stats.num_cached_tokens
    started = time.perf_counter()
    results = serve(
        engine,
        prompts,
        SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        on_token=lambda index, _: first.setdefault(index, time.perf_counter() - started),
    )
    seconds = time.perf_counter() - started
    return PrefixRun(
        results,
        stats.num_computed_prompt_tokens - computed,
        stats.num_cached_tokens - cached,
        float(np.mean(list(first.values()))),
        sum(len(result.token_ids) for result in results) / seconds,
    )


def print_prefix_table(console: Console, report: PrefixReport, prompts: list[list[int]], sizes: PrefixSizes) -> None:
    """One line a figure, without and with the prefix cache."""
    table = Table(title=f"{len(prompts)} prompts that begin with the same {sizes.shared_tokens} tokens")
    table.add_column("")
    table.add_column("without prefix cache", justify="right")
    table.add_column("with it", justify="right")
    runs = (report.without, report.cached)
    table.add_row("prompt tokens", *[str(sum(map(len, prompts)))] * 2)
    table.add_row("prompt tokens computed", *(str(run.num_computed) for run in runs))
    table.add_row("time to first token, mean", *(f"{run.first_token_seconds * 1e3:.0f} ms" for run in runs))
    table.add_row("tokens/s, compilation left out", *(f"{run.tokens_per_second:.0f}" for run in runs))
    sooner = report.without.first_token_seconds / report.cached.first_token_seconds
    fewer = report.without.num_computed / report.cached.num_computed
    table.caption = (
        f"with it: {fewer:.1f} times fewer prompt tokens computed, the first token {sooner:.1f} times sooner"
    )
    console.print(table)
    console.print(f"tokens: {report.comparison}", highlight=False)
