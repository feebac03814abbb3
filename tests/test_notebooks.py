"""What is committed of each notebook is a whole run from top to bottom; ``scripts/run_notebooks.py`` makes one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells_of(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_six() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_whole_and_clean(path: Path) -> None:
    code = cells_of(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
    assert any("image/png" in output.get("data", ()) for cell in code for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_the_first_cell_installs(path: Path) -> None:
    first, *others = ("".join(cell["source"]) for cell in cells_of(path, "code"))
    assert 'find_spec("pyagent_kv_jax") is None' in first
    assert "%pip install" in first
    assert not [source for source in others if re.search(r"pip install|^\s*!|urlopen|requests\.get", source, re.M)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files_that_are_there(path: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`(\w+\.ipynb)`", text)
    assert [link for link in named if not (path.parent / link).exists()] == []
