"""Forms made afresh from their source, as it is or broken on purpose; the sound ones stay as they are."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from types import ModuleType

import pytest


def load(source: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of that source, which dataclasses and other modules can find while the test runs."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def broken(form: str, where: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Module ``form`` with ``old``, which stands once in the source of module ``where``, replaced by ``new``.

    Every module by whose imports the one reaches the other is made afresh too.
    """
    afresh: dict[str, ModuleType | None] = {}

    def made_afresh(name: str) -> ModuleType | None:
        """None if nothing in it changes."""
        if name not in afresh:
            source = inspect.getsource(importlib.import_module(name))
            if name == where:
                assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {where}"
                changed = source.replace(old, new)
            else:
                changed = re.sub(
                    r"^( *from )(pallas_kernels\.[\w.]+)(?= import)",
                    lambda found: found[1] + ("mutant." if made_afresh(found[2]) else "") + found[2],
                    source,
                    flags=re.MULTILINE,
                )
            unchanged = changed == source and name != where
            afresh[name] = None if unchanged else load(changed, f"mutant.{name}", monkeypatch)
        return afresh[name]

    module = made_afresh(form)
    assert module is not None, f"{form} does not import {where}"
    return module
