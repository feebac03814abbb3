"""Values of a ``config.json``, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyagent_kv_jax.errors import ModelLoadError


def size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; ``default`` where there is none.

    Raises:
        ModelLoadError: something else, or nothing and no default.
    """
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"config.json: got {key} {value!r}, want a positive integer")
    return value


def number(raw: Mapping[str, Any], key: str) -> float:
    """A positive finite number.

    Raises:
        ModelLoadError: something else, or nothing.
    """
    value = raw.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ModelLoadError(f"config.json: got {key} {value!r}, want a positive number")
    return value


def optional_number(raw: Mapping[str, Any], key: str) -> float | None:
    """A positive finite number, or None where there is none.

    Raises:
        ModelLoadError: something else.
    """
    return None if raw.get(key) is None else number(raw, key)


def refuse_other_than(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Each key of ``wanted`` has its value there, or none.

    Raises:
        ModelLoadError: it has another.
    """
    for key, want in wanted.items():
        if raw.get(key) is not None and raw[key] != want:
            raise ModelLoadError(f"config.json: got {key} {raw[key]!r}, want {want!r}")


def layer_windows(raw: Mapping[str, Any], default_kinds: list[str]) -> tuple[int | None, ...]:
    """``sliding_window`` for each sliding layer of ``layer_types``, None for each full one; empty if all are full.

    transformers masks a key at ``kv <= query - sliding_window``: the window counts the query itself, as ours does.

    Raises:
        ModelLoadError: kinds of another number or name, or sliding layers and no window.
    """
    kinds = raw.get("layer_types") or default_kinds
    known = {"sliding_attention", "full_attention"}
    if not isinstance(kinds, list) or len(kinds) != len(default_kinds) or any(kind not in known for kind in kinds):
        raise ModelLoadError(
            f"config.json: got layer_types {kinds}, want {len(default_kinds)} 'full_attention' or 'sliding_attention'"
        )
    if "sliding_attention" not in kinds:
        return ()
    return tuple(size(raw, "sliding_window") if kind == "sliding_attention" else None for kind in kinds)


def layer_types(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """The keys that ``layer_windows`` reads; none where no layer has a window."""
    widths = [window for window in windows if window is not None]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"sliding_window": widths[0], "layer_types": kinds} if widths else {}
