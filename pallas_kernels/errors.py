"""The one error of this package, and how its messages name an argument."""

from __future__ import annotations

from typing import Any


class ArgumentError(ValueError):
    """An argument that does not fit: the message says what was received and what is wanted.

    Raised before anything is launched, and never answered by trying another implementation.
    """


def describe(value: Any) -> str:
    """``float32[4, 8]`` for an array, ``repr`` and type for anything else."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return f"{value!r} ({type(value).__name__})"
    return f"{dtype}[{', '.join(map(str, shape))}]"


def require(condition: bool, name: str, got: Any, want: str) -> None:
    """Raise ``ArgumentError`` saying that argument ``name`` is ``got`` where ``want`` is wanted."""
    if not condition:
        raise ArgumentError(f"{name}: got {describe(got)}, want {want}")
