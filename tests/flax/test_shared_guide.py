"""The guide to models of one's own: its Python runs, and its two diffs are what ``outside_models/`` tests."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from pyagent_kv_jax.serving.compiled_step import split_model

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "bring_your_own_model.md").read_text()
FILES = ("qwen3_paged.py", "gemma_paged.py")


def region(file: str, name: str) -> list[str]:
    """Lines between the markers ``# [name`` and ``# name]``, each pair in turn, without blank lines and markers."""
    text = (ROOT / "outside_models" / file).read_text()
    found = re.findall(rf"# \[{name}\n(.*?)# {name}\]", text, flags=re.DOTALL)
    lines = [line for part in found for line in part.splitlines()]
    return [line for line in lines if line.strip() and not re.fullmatch(r"# (\[\w+|\w+\])", line.strip())]


def test_its_python_runs() -> None:
    """One block after another; each asserts what it should give."""
    blocks = re.findall(r"(<!-- \w+\.py -->\n)?```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    own = [code for outside, code in blocks if not outside]
    assert len(own) == 5
    names: dict[str, object] = {}
    for code in own:
        exec(compile(code, "bring_your_own_model.md", "exec"), names)


def test_a_model_whose_attributes_cannot_be_hashed_has_a_step_of_its_own() -> None:
    """As tunix's ``ModelConfig``, a dataclass that may change."""

    @dataclasses.dataclass
    class Settings:
        size: int = 4

    class Model(nnx.Module):
        def __init__(self, settings: Any) -> None:
            self.settings, self.weight = settings, nnx.Param(jnp.ones(4))

    steps = [split_model(Model(Settings()))[0] for _ in range(2)]
    assert steps[0] is not steps[1]
    assert split_model(Model(4))[0] is split_model(Model(4))[0]


@pytest.mark.parametrize("file", FILES)
def test_a_diff_is_what_is_tested_and_under_15_lines(file: str) -> None:
    diff = re.findall(r"```diff\n(.*?)```", GUIDE, flags=re.DOTALL)[FILES.index(file)]
    changed = [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[1:].strip()]
    assert [line[1:] for line in changed if line[0] == "+"] == region(file, "diff")
    assert len(changed) < 15


@pytest.mark.parametrize("file", FILES)
def test_a_module_is_what_is_tested(file: str) -> None:
    block = re.search(rf"<!-- {file} -->\n```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert block is not None
    assert [line for line in block[1].splitlines() if line.strip()] == region(file, "model")
