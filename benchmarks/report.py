"""What every benchmark shares: how a call is timed, what a row says, the table and the file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. Times are microseconds of one call; None where there is nothing to compare with.

    Attributes:
        case: what was run.
        ours_us: this library.
        baseline: what it is compared with.
        baseline_us: that.
        limit_us: what the hardware, as measured in the same run, allows.
        device: where; by default JAX's default device.
        num_bytes: that the call has to read and write; None: not counted.
        flops: floating-point operations that it has to do; None: not counted.
    """

    case: str
    ours_us: float
    baseline: str | None = None
    baseline_us: float | None = None
    limit_us: float | None = None
    device: str = dataclasses.field(default_factory=lambda: device_name())
    jax: str = jax.__version__
    num_bytes: int | None = None
    flops: float | None = None

    @property
    def ratio_to_baseline(self) -> float | None:
        """How many times faster than the baseline."""
        return None if self.baseline_us is None else self.baseline_us / self.ours_us

    @property
    def ratio_to_limit(self) -> float | None:
        """Which part of the limit is reached."""
        return None if self.limit_us is None else self.limit_us / self.ours_us

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in the file: times to 0.01 us, ratios to 0.001."""
        times = {name: _rounded(getattr(self, name), 2) for name in ("ours_us", "baseline_us", "limit_us")}
        ratios = {name: _rounded(getattr(self, name), 3) for name in ("ratio_to_baseline", "ratio_to_limit")}
        work = {name: getattr(self, name) for name in ("num_bytes", "flops") if getattr(self, name) is not None}
        return {
            "case": self.case,
            "ours_us": times["ours_us"],
            "baseline": self.baseline,
            "baseline_us": times["baseline_us"],
            "limit_us": times["limit_us"],
            **ratios,
            **work,
            "device": self.device,
            "jax": self.jax,
        }


def median_us(call: Callable[[], Any], *, repeats: int = 15, warmup: int = 2) -> float:
    """Median time of one call, its result waited for."""
    return medians_us({"call": call}, repeats=repeats, warmup=warmup)["call"]


def medians_us(calls: Mapping[str, Callable[[], Any]], *, repeats: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median time of each call, results waited for. The calls take turns, so that a busy machine is fair to all."""
    for call in calls.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) * 1e6 for name, taken in times.items()}


def fastest(times: Mapping[str, float], names: Iterable[str]) -> tuple[str, float]:
    """The fastest of ``names``, and its time."""
    best = min(names, key=lambda name: times[name])
    return best, times[best]


def device_name() -> str:
    """JAX's default device in words; for a CPU, the processor and how many cores of it."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{_processor()}, {os.cpu_count()} cores"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows ``--json FILE``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    return parser


def publish(rows: Sequence[Row], path: pathlib.Path | None, **also: Any) -> None:
    """Print the rows as a table; with ``path``, write them there as JSON, with date, command, versions and ``also``."""
    print(table(rows))
    if path is None:
        return
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "versions": versions(),
        **also,
        "rows": [row.as_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned, for reading."""
    head = ["case", "ours", "baseline", "", "limit", "x baseline", "of limit"]
    lines = [head] + [
        [
            row.case,
            _duration(row.ours_us),
            row.baseline or "-",
            _duration(row.baseline_us),
            _duration(row.limit_us),
            "-" if row.ratio_to_baseline is None else f"{row.ratio_to_baseline:.2f}",
            "-" if row.ratio_to_limit is None else f"{row.ratio_to_limit:.0%}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    devices = ", ".join(sorted({f"{row.device}, jax {row.jax}" for row in rows}))
    return "\n".join([line.rstrip() for line in aligned] + [devices])


def versions() -> dict[str, str]:
    """Python, and of the packages a benchmark may use those that are installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "numpy", "flax", "torch", "vllm", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _duration(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
