"""The API reference is built from docstrings: whatever a public module exports has one."""

from __future__ import annotations

import importlib
import inspect
import runpy
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[1] / "scripts" / "build_api_reference.py"
PUBLIC_MODULES = runpy.run_path(str(_SCRIPT))["PUBLIC_MODULES"]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_name_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert undocumented(module) == []


def test_a_missing_docstring_is_noticed():
    class Described:
        """Says what it is."""

        def method(self):
            pass

    module = type("Module", (), {"__all__": ["Described", "function"], "Described": Described, "function": len})
    module.function = lambda: None
    assert undocumented(module) == ["Described.method", "function"]


def undocumented(module) -> list[str]:
    """Exported classes, functions and public methods without a docstring of their own."""
    missing = []
    for name in module.__all__:
        exported = getattr(module, name)
        if not (inspect.isclass(exported) or inspect.isroutine(exported)):
            continue
        # A dataclass without one is given its signature.
        if (inspect.getdoc(exported) or f"{name}(").startswith(f"{name}("):
            missing.append(name)
        if inspect.isclass(exported):
            missing += [f"{name}.{key}" for key in vars(exported) if _lacks_docstring(exported, key)]
    return missing


def _lacks_docstring(cls: type, key: str) -> bool:
    member = inspect.getattr_static(cls, key)
    is_method = isinstance(member, (property, classmethod, staticmethod)) or inspect.isroutine(member)
    return is_method and not key.startswith("_") and not inspect.getdoc(member)
