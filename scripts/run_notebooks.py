"""Run notebooks from top to bottom, each in a fresh kernel, and say how long each took.

    pip install -e '.[notebooks]' && python scripts/run_notebooks.py          # all of notebooks/
    python scripts/run_notebooks.py --save notebooks/1_quickstart.ipynb       # and keep what they show

Exits with 1 if a cell of one raised.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT = 300  # seconds; a hang is an error, a slow machine is not


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with what it shows.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def without_traces_of_a_run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same, with nothing in it that differs from run to run but is not shown."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run those named, or all; exit 1 if a cell of one raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="*", default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--save", action="store_true", help="write what the cells show into the notebooks")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.paths:
        start = time.monotonic()
        try:
            notebook = run(path)
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name}: a cell raised\n{error}", flush=True)
            continue
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
        if arguments.save:
            nbformat.write(without_traces_of_a_run(notebook), path)
    print(f"{len(arguments.paths) - failed} passed, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
