"""The benchmarks of the kernels run, and tuning picks what is fastest. No times are asserted but made-up ones."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tune
from benchmarks.device_time import chained
from benchmarks.kernel_inputs import Sizes
from benchmarks.kernels import Bench, all_rows
from pallas_kernels import tuning

TINY = Sizes(1 << 14, (32,), 64, ((2, 64),), (2, 64), (16,), ("Llama-3-8B",))


@pytest.mark.parametrize("word", ["merge", "decode", "prefill"])
def test_every_case_gives_rows(word: str) -> None:
    bench = Bench(TINY, 1e9, 1e9)
    rows = [row for some in all_rows(bench, [word]) for row in some]
    assert rows
    assert all(row.ours_us > 0 and row.limit_us > 0 and row.baseline == "xla" for row in rows)
    assert not bench.left_out


def test_a_baseline_that_cannot_be_had_is_noted() -> None:
    def missing() -> float:
        raise ImportError("no such package")

    bench = Bench(TINY, 1e9, 1e9)
    [row] = bench.rows("case", 1.0, {"other": missing}, num_bytes=2000, flops=500.0)
    assert (row.baseline, row.ratio_to_limit) == (None, 2.0)
    assert bench.left_out == {"case: other": "ImportError: no such package"}
    [row] = bench.rows("case", 1.0, {}, num_bytes=2000, flops=4000.0)
    assert row.as_dict()["ratio_to_limit"] == 4.0
    assert (row.as_dict()["num_bytes"], row.as_dict()["flops"]) == (2000, 4000.0)


def test_a_call_that_never_changes_is_made_every_time_around_the_loop() -> None:
    """XLA may move a pure call with unchanging arguments out of a loop; this one it must not."""
    calls = []

    def count(x: np.ndarray) -> np.ndarray:
        calls.append(1)
        return x

    def call(x: jax.Array) -> jax.Array:
        return jax.pure_callback(count, jax.ShapeDtypeStruct((8,), jnp.float32), x)

    step, start = chained(call), (jnp.ones(8), jnp.zeros(8))
    jax.block_until_ready(jax.jit(lambda state: jax.lax.fori_loop(0, 10, lambda _, s: step(s), state))(start))
    assert len(calls) == 10


def _case(times: dict[int, float], name: str = "made up") -> tune.Case:
    """As if ``words`` decided the time."""

    def measure() -> float:
        rule = {"words": 4096, "num_warps": 8}
        chosen = tuning.parameters("paged_gather", "triton", "some GPU", {"page_bytes": 1}, rule)
        if chosen["num_warps"] == 4:
            raise ValueError("does not compile")
        return times[chosen["words"]]

    return tune.Case(name, "paged_gather", measure)


def test_tuning_takes_the_best_over_all_cases_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "none.json")
    tuning.table.cache_clear()
    first, second = _case({1024: 5, 2048: 7, 4096: 10, 8192: 10}), _case({1024: 20, 2048: 6, 4096: 10, 8192: 10})
    question = tune.question_of(first)
    assert question is not None
    assert tune.tune([first], question) == {"words": 1024, "num_warps": 8}
    assert tune.tune([first, second], question) == {"words": 2048, "num_warps": 8}
    assert tune.tune([_case({1024: 9.9, 2048: 10, 4096: 10, 8192: 10})], question) == {}, "within the noise"
    table: dict = {"paged_copy": {"triton": {"some GPU": {"x=1": {"words": 1}}}}}
    tune.put(table, question, {"words": 2048, "num_warps": 8}, tune.SPACES["paged_gather"])
    assert table["paged_gather"]["triton"]["some GPU"] == {"page_bytes=1": {"words": 2048, "num_warps": 8}}
    tune.put(table, question, {}, tune.SPACES["paged_gather"])
    assert table == {
        "paged_copy": {"triton": {"some GPU": {"x=1": {"words": 1}}}},
        "paged_gather": {"triton": {"some GPU": {}}},
    }
    tuning.table.cache_clear()
