"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    if "results" in names:
        assert [len(result.token_ids) for result in names["results"]] == [16, 16]
    else:
        assert names["tokens"].shape == (8,)
        assert names["cache"].table.num_tokens.tolist() == [1] * 8
