"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_examples_run_one_after_another() -> None:
    assert len(EXAMPLES) == 4
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, str(README), "exec"), names)
    assert names["tokens"].shape == (8,)
    assert names["cache"].table.num_tokens.tolist() == [1] * 8
    assert [plan.num_cached_tokens.tolist() for plan in names["plans"]] == [[0], [96]]
    assert [plan.num_tokens.tolist() for plan in names["plans"]] == [[100], [4]]
    assert [len(result.token_ids) for result in names["results"]] == [16, 16]
    assert [result.token_ids for result in names["spread"]] == [result.token_ids for result in names["results"]]
