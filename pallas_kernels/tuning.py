"""Kernel parameters that were measured, by operation, implementation, device kind and shape.

The table is ``tuning.json``, refilled by ``python -m benchmarks.tune`` on the device itself. Where it is silent, a
form takes its own heuristic. A shape is a few named numbers, whatever decides the best parameters; lengths go in
rounded up to a power of two, so that near sizes share an entry.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("tuning.json")

_FORCED: ContextVar[Mapping[str, Mapping[str, int]] | None] = ContextVar("forced_kernel_parameters", default=None)

_ASKED: ContextVar[list[Asked] | None] = ContextVar("asked_kernel_parameters", default=None)


class Asked(NamedTuple):
    """A question to the table: whose parameters, for which shape, and what the form takes where it is silent."""

    operation: str
    implementation: str
    device_kind: str
    key: str
    rule: tuple[tuple[str, int], ...]

    @property
    def heuristic(self) -> dict[str, int]:
        return dict(self.rule)


def shape_key(shape: Mapping[str, Any]) -> str:
    """``"block_size=16,head_dim=128"``: a shape as the table names it."""
    return ",".join(f"{name}={shape[name]}" for name in sorted(shape))


def parameters(
    operation: str,
    implementation: str,
    device_kind: str,
    shape: Mapping[str, Any],
    heuristic: Mapping[str, int],
    partner: Collection[str] = (),
) -> dict[str, int]:
    """``heuristic``, overruled by the table's entry for this device and shape, overruled by ``forced``.

    ``partner`` names the parameters of another implementation that serves a part of the same call: forced, they are
    none of ours.
    """
    asked = _ASKED.get()
    if asked is not None:
        asked.append(Asked(operation, implementation, device_kind, shape_key(shape), tuple(heuristic.items())))
    entries = table().get(operation, {}).get(implementation, {}).get(device_kind, {})
    forced = (_FORCED.get() or {}).get(operation, {})
    ours = {name: value for name, value in forced.items() if name in heuristic or name not in partner}
    chosen = {**heuristic, **entries.get(shape_key(shape), {}), **ours}
    unknown = set(chosen) - set(heuristic)
    if unknown:
        raise ValueError(f"{operation}, {implementation}: got parameters {sorted(unknown)}, want {sorted(heuristic)}")
    return chosen


@contextmanager
def forced(operation: str, **chosen: int) -> Iterator[None]:
    """Inside, ``operation`` runs with these parameters: for tuning and for tests.

    A ``jit`` of the caller's is traced once: enter before its first call.
    """
    everything = dict(_FORCED.get() or {})
    everything[operation] = {**everything.get(operation, {}), **chosen}
    token = _FORCED.set(everything)
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def recorded() -> Iterator[list[Asked]]:
    """Inside, every question that is put to the table is added to the list: for tuning."""
    asked: list[Asked] = []
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]:
    """operation -> implementation -> device kind -> shape key -> parameters."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def power_of_2_up_to(limit: int, number: int) -> int:
    """The largest power of two that divides ``number``, ``limit`` (itself a power of two) at most."""
    return min(number & -number, limit)


def next_power_of_2(number: int) -> int:
    """The smallest power of two of at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()
