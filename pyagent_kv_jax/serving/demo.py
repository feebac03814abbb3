"""``pyagent-kv demo``: the same model, requests and memory, once with a dense cache and once with a paged one.

Then prompts that begin alike, without and with the prefix cache.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import KVCacheError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.manager.options import ManagerOptions
from pyagent_kv_jax.models import load_model, load_tokenizer
from pyagent_kv_jax.pictures.blocks_over_time import BlocksPanel, blocks_over_time
from pyagent_kv_jax.serving.cache_backend import CacheBackend
from pyagent_kv_jax.serving.cache_record import CacheHistory, CacheRecord
from pyagent_kv_jax.serving.dense_baseline import DenseCacheManager
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import GenerationResult, serve
from pyagent_kv_jax.serving.prefix_demo import (
    PrefixReport,
    PrefixSizes,
    compare_prefix_caching,
    prefix_traffic,
    print_prefix_table,
)
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.token_equality import Comparison, compare_tokens

PICTURE = "kv_cache_blocks.png"


@dataclasses.dataclass(frozen=True)
class DemoSizes:
    """What is served, and with how much memory.

    Attributes:
        num_prompts: requests, all waiting at the start.
        prompt_tokens: shortest and longest prompt; the others lie between, evenly on a log scale.
        output_tokens: fewest and most tokens generated; evenly between.
        max_model_len: tokens of a row of the dense cache.
        dense_rows: rows of the dense cache; the paged one has as many bytes.
        block_size: tokens of a block of the paged cache.
        token_budget: tokens computed in one step.
        row_buckets: batch sizes that decode steps are padded to.
        repeats: timed runs of each cache, in turn; the fastest counts.
        prefix: what the second table serves, through the same paged cache.
    """

    num_prompts: int = 48
    prompt_tokens: tuple[int, int] = (16, 1000)
    output_tokens: tuple[int, int] = (96, 160)
    max_model_len: int = 2048
    dense_rows: int = 4
    block_size: int = 16
    token_budget: int = 256
    row_buckets: tuple[int, ...] = (4, 16, 32)
    repeats: int = 3
    prefix: PrefixSizes = dataclasses.field(default_factory=PrefixSizes)


@dataclasses.dataclass(frozen=True)
class Run:
    """One cache's run over all requests."""

    config: KVCacheConfig
    results: list[GenerationResult]
    history: CacheHistory
    seconds: float
    num_compilations: int
    num_preemptions: int

    @property
    def num_generated(self) -> int:
        """Tokens generated."""
        return sum(len(result.token_ids) for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, prefill included, compilation not."""
        return self.num_generated / self.seconds


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What the demo found."""

    dense: Run
    paged: Run
    comparison: Comparison
    picture: Path
    prefix: PrefixReport


def run_demo(out: str | os.PathLike[str] = ".", sizes: DemoSizes = DemoSizes()) -> DemoReport:
    """Serve, compare, print two tables, save one picture.

    Args:
        out: a folder, or the name of a ``.png``.
        sizes: of the traffic and of the caches.

    Raises:
        KVCacheError: the two caches gave different tokens, or the prefix cache changed some.
    """
    console = Console()
    with demo_model_directory() as directory:
        model, config = load_model(directory)
        tokens = load_tokenizer(directory).encode(demo_text()).ids
    prompts, sampling = demo_traffic(tokens, sizes)
    base = config.kv_cache_config(max_model_len=sizes.max_model_len, num_blocks=1, block_size=sizes.block_size)
    lengths = [len(prompt) + each.max_tokens for prompt, each in zip(prompts, sampling, strict=True)]
    console.print(
        f"{len(prompts)} requests of {min(lengths)} to {max(lengths)} tokens (mean {np.mean(lengths):.0f}), greedy, "
        f"on one {base.device_type.value} device. Compiling, then serving ..."
    )
    num_blocks = sizes.dense_rows * sizes.max_model_len // sizes.block_size
    paged_config = dataclasses.replace(base, num_blocks=num_blocks, max_num_reqs=sizes.num_prompts)
    dense_engine = _warm_engine(model, DenseCacheManager.like(base, sizes.dense_rows), sizes.dense_rows, sizes)
    # The first table is about memory: no prompt may find itself there from the run before.
    without_prefixes = KVCacheManager(paged_config, ManagerOptions(prefix_caching=False))
    paged_engine = _warm_engine(model, without_prefixes, sizes.num_prompts, sizes)
    dense, paged = _serve_in_turn((dense_engine, paged_engine), prompts, sampling, sizes)

    def regenerate(known: list[list[int]], max_tokens: list[int]) -> list[GenerationResult]:
        return serve(paged_engine, known, [SamplingParams(max_tokens=n, ignore_eos=True) for n in max_tokens])

    comparison = compare_tokens(prompts, dense.results, paged.results, regenerate)
    picture = _picture_path(out)
    _draw(dense, paged, sizes, picture)
    _print_table(console, dense, paged)
    console.print(f"tokens: {comparison}\npicture: {picture}", highlight=False)
    if not comparison.equal:
        raise KVCacheError(f"dense and paged tokens: {comparison}")
    cached_engine = _warm_engine(model, KVCacheManager(paged_config), sizes.num_prompts, sizes)
    alike = prefix_traffic(tokens, sizes.prefix)
    prefix = compare_prefix_caching(paged_engine, cached_engine, alike, sizes.prefix)
    print_prefix_table(console, prefix, alike, sizes.prefix)
    if not prefix.comparison.equal:
        raise KVCacheError(f"tokens with and without the prefix cache: {prefix.comparison}")
    return DemoReport(dense, paged, comparison, picture, prefix)


def demo_model_directory() -> Any:
    """The checkpoint in the package, as a context manager that gives its folder."""
    return importlib.resources.as_file(importlib.resources.files("pyagent_kv_jax.serving") / "demo_model")


def demo_text() -> str:
    """Python's own reference text."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def demo_traffic(tokens: Sequence[int], sizes: DemoSizes) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts cut from a text, and how much to generate after each; the same every time."""
    rng = np.random.default_rng(0)
    shortest, longest = sizes.prompt_tokens
    prompt_lengths = rng.permutation(np.geomspace(shortest, longest, sizes.num_prompts).astype(int))
    output_lengths = rng.permutation(np.linspace(*sizes.output_tokens, sizes.num_prompts).astype(int))
    starts = np.linspace(0, len(tokens) - longest, sizes.num_prompts).astype(int)
    prompts = [list(tokens[start : start + n]) for start, n in zip(starts, prompt_lengths, strict=True)]
    return prompts, [SamplingParams(max_tokens=int(n), ignore_eos=True) for n in output_lengths]


def _warm_engine(model: Any, backend: CacheBackend, max_num_seqs: int, sizes: DemoSizes) -> Engine:
    config = EngineConfig(max_num_seqs, sizes.token_budget, sizes.row_buckets, with_margins=True)
    engine = Engine(model, backend, config)
    engine.warm_up()
    return engine


def _serve_in_turn(
    engines: Sequence[Engine], prompts: list[list[int]], sampling: list[SamplingParams], sizes: DemoSizes
) -> list[Run]:
    """Serve everything through each engine, several times in turn, so that a busy machine is unfair to neither."""
    runs = [_recorded_run(engine, prompts, sampling, sizes.block_size) for engine in engines]
    for _ in range(sizes.repeats - 1):
        again = [_timed(engine, prompts, sampling)[1] for engine in engines]
        runs = [
            dataclasses.replace(run, seconds=min(run.seconds, seconds))
            for run, seconds in zip(runs, again, strict=True)
        ]
    return runs


def _recorded_run(engine: Engine, prompts: list[list[int]], sampling: list[SamplingParams], unit: int) -> Run:
    config = engine.backend.config
    record = CacheRecord(config.pool_blocks, config.block_size)
    engine.on_step = record.add
    results, seconds = _timed(engine, prompts, sampling)
    engine.on_step = None
    preemptions = engine.scheduler.stats.num_preemptions
    return Run(config, results, record.history(unit), seconds, engine.num_compilations, preemptions)


def _timed(
    engine: Engine, prompts: list[list[int]], sampling: list[SamplingParams]
) -> tuple[list[GenerationResult], float]:
    started = time.perf_counter()
    results = serve(engine, prompts, sampling)
    return results, time.perf_counter() - started


def _picture_path(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    return path if path.suffix == ".png" else path / PICTURE


def _draw(dense: Run, paged: Run, sizes: DemoSizes, path: Path) -> None:
    def title(run: Run, what: str) -> str:
        history = run.history
        return (
            f"{what}: {history.in_flight.mean():.1f} requests in flight, {history.waste:.0%} of what they reserve "
            f"is empty, {len(history.owner)} steps"
        )

    label = f"memory, in units of {sizes.block_size} tokens"
    rows = f"Dense cache, {sizes.dense_rows} rows of {sizes.max_model_len} tokens"
    blocks = f"Paged cache, the same memory in {paged.config.pool_blocks} blocks of {sizes.block_size}"
    units = sizes.max_model_len // sizes.block_size
    panels = [
        BlocksPanel(title(dense, rows), label, dense.history.owner, dense.history.used, units),
        BlocksPanel(title(paged, blocks), "block id", paged.history.owner, paged.history.used, units),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks_over_time(panels).savefig(path, dpi=120)


def _print_table(console: Console, dense: Run, paged: Run) -> None:
    table = Table(title="K/V cache at equal memory")
    for heading in ("", "dense", "paged"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, *values in zip(_LABELS, _figures(dense), _figures(paged), strict=True):
        table.add_row(label, *values)
    in_flight = paged.history.in_flight.mean() / dense.history.in_flight.mean()
    speed = paged.tokens_per_second / dense.tokens_per_second
    table.caption = f"paged: {in_flight:.1f} times the requests in flight, {speed:.1f} times the tokens/s"
    console.print(table)


_LABELS = (
    "cache",
    "bytes of the cache",
    "bytes reserved, mean (peak)",
    "bytes used, mean (peak)",
    "waste: reserved, not used",
    "requests in flight, mean (peak)",
    "preemptions",
    "tokens generated",
    "tokens/s, compilation left out",
    "compilations",
)


def _figures(run: Run) -> list[str]:
    history, config = run.history, run.config
    per_token = config.kv_size_per_token()

    def mebibytes(tokens: float) -> str:
        return f"{tokens * per_token / 2**20:.2f} MiB"

    def mean_and_peak(tokens: np.ndarray) -> str:
        return f"{mebibytes(tokens.mean())} ({mebibytes(tokens.max())})"

    return [
        f"{config.pool_blocks} x {config.block_size} tokens",
        mebibytes(config.pool_blocks * config.block_size),
        mean_and_peak(history.reserved_tokens),
        mean_and_peak(history.used_tokens),
        f"{history.waste:.1%}",
        f"{history.in_flight.mean():.1f} ({history.in_flight.max()})",
        str(run.num_preemptions),
        str(run.num_generated),
        f"{run.tokens_per_second:.0f}",
        str(run.num_compilations),
    ]
