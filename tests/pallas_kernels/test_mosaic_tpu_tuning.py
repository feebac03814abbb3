"""Parameters of the Mosaic TPU forms: from the table, for a device kind and a shape; no result depends on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from benchmarks.tune import SPACES, put, question_of, tune
from benchmarks.tune import Case as TuneCase
from pallas_kernels import merge_attention_states, paged_attention, paged_copy, paged_gather, paged_write, tuning
from pallas_kernels.merge_attention_states import mosaic_tpu as merge_form
from pallas_kernels.paged_attention import mosaic_tpu as attention_form
from pallas_kernels.paged_attention.mosaic_tpu_parameters import heuristic
from pallas_kernels.paged_attention.shapes import SHAPES
from pallas_kernels.paged_copy import mosaic_tpu as copy_form
from pallas_kernels.paged_gather import mosaic_tpu as gather_form
from pallas_kernels.paged_write import mosaic_tpu as write_form
from pallas_kernels.tpu import Tpu, target_tpu
from pallas_kernels.tuning import Asked, forced
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.merge_cases import MergeCase
from tests.pallas_kernels.mosaic_checks import (
    STRICT,
    check_attention,
    check_copy,
    check_gather,
    check_merge,
    check_write,
    interpreted,
)
from tests.pallas_kernels.page_cases import CopyCase, GatherCase
from tests.pallas_kernels.write_cases import WriteCase

MOSAIC: dict[str, Any] = {"implementation": "mosaic_tpu"}


def _calls() -> dict[str, Callable[[], Any]]:
    pages, ids = jnp.zeros((4, 2, 64, 128)), jnp.zeros(3, jnp.int32)
    token = jnp.zeros((3, 2, 128))
    loc = jnp.array([0, 1, 1, 3])
    return {
        "paged_gather": lambda: paged_gather(pages, ids, **MOSAIC),
        "paged_copy": lambda: paged_copy(pages, ids, ids, **MOSAIC),
        "paged_write": lambda: paged_write(pages, pages, token, token, ids, **MOSAIC),
        "merge_attention_states": lambda: merge_attention_states(token[None], token[None, ..., 0], **MOSAIC),
        "paged_attention": lambda: paged_attention(token, pages, pages, ids[:, None], ids, loc, **MOSAIC),
    }


# Other values than the heuristics' for those calls.
OTHERS = {
    "paged_gather": {"in_flight": 3},
    "paged_copy": {"in_flight": 3},
    "paged_write": {"strip_rows": 32},
    "merge_attention_states": {"rows": 256},
    "paged_attention": {"prefill_queries": 1},
}


@pytest.mark.parametrize(
    ("kind", "platform"), [("TPU v5 lite", "tpu"), ("TPU v6 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H200", "gpu")]
)
def test_a_tpu_that_is_not_there_is_known_by_its_name(kind: str, platform: str) -> None:
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        if platform == "tpu":
            assert target_tpu() == Tpu(kind, False)
        else:
            with pytest.raises(NotImplementedError, match="run on a TPU, and this is for a gpu"):
                target_tpu()


def test_under_the_interpreter_the_kind_says_so() -> None:
    with interpreted():
        assert target_tpu() == Tpu("interpreted", STRICT)


def _program(operation: str) -> tuple[str, Asked]:
    """What the call is traced to, and what it asked the table."""
    with interpreted(), tuning.recorded() as asked:
        program = str(jax.make_jaxpr(lambda: _calls()[operation]())())
    return program, next(one for one in asked if one.operation == operation)


@pytest.mark.parametrize("operation", list(OTHERS))
def test_an_entry_of_the_table_changes_the_program(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rule, asked = _program(operation)
    with forced(operation, **OTHERS[operation]):
        by_force, _ = _program(operation)
    assert by_force != by_rule
    assert (asked.implementation, asked.device_kind) == ("mosaic_tpu", "interpreted")
    table: dict[str, Any] = {}
    put(table, asked, OTHERS[operation], {})
    (tmp_path / "tuning.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    tuning.table.cache_clear()
    try:
        by_table, _ = _program(operation)
    finally:
        tuning.table.cache_clear()
    assert by_table == by_force


@pytest.mark.parametrize("operation", list(OTHERS))
def test_the_tuner_has_values_for_every_parameter(operation: str) -> None:
    _, asked = _program(operation)
    spaces = [space for name, space in SPACES.items() if name.split()[0] == operation]
    assert set(asked.heuristic) <= {parameter for space in spaces for parameter in space}


def test_the_tuner_takes_the_best_that_compiles() -> None:
    """As if only the transfers at a time decided, and too many were no program."""
    times = {4: 12.0, 8: 11.0, 16: 10.0, 32: 5.0}

    def measure() -> float:
        chosen = tuning.parameters("paged_gather", "mosaic_tpu", "some TPU", {"page_bytes": 1}, {"in_flight": 16})
        if chosen["in_flight"] not in times:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem")
        return times[chosen["in_flight"]]

    case = TuneCase("made up", "paged_gather", measure)
    question = question_of(case)
    assert question is not None
    assert tune([case], question) == {"in_flight": 32}


LONG = AttentionCase("parameters", kv_lens=(70, 150, 33), query_lens=(1, 21, 9), block_size=8, sliding_window=90)


@pytest.mark.parametrize(("pages", "queries"), [(1, 2), (1000, 1024)])
def test_attention_is_the_same_with_any(pages: int, queries: int) -> None:
    with forced("paged_attention", decode_pages=pages, prefill_pages=pages, prefill_queries=queries):
        check_attention(attention_form.paged_attention, LONG)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_write_is_the_same_with_any(rows: int) -> None:
    case = WriteCase("strips", slots=None, runs=((100, 0, 130), (280, 130, 70)), num_tokens=200, block_size=128)
    with forced("paged_write", strip_rows=rows):
        check_write(write_form.paged_write, case)


@pytest.mark.parametrize("in_flight", [1, 5, 64])
def test_moves_are_the_same_with_any(in_flight: int) -> None:
    with forced("paged_gather", in_flight=in_flight), forced("paged_copy", in_flight=in_flight):
        check_gather(gather_form.paged_gather, GatherCase("in-flight", (3, -1, 8, 0, 5, 1, 1)))
        check_copy(copy_form.paged_copy, CopyCase("in-flight", (3, 1, 4, 5, -1, 6, 7), (5, -1, 3, 0, 1, 2, 8)))


@pytest.mark.parametrize("rows", [128, 384])
def test_merge_is_the_same_with_any(rows: int) -> None:
    with forced("merge_attention_states", rows=rows):
        check_merge(merge_form.merge_attention_states, MergeCase("rows", shape=(70, 8), head_dim=16))


@pytest.mark.parametrize(
    ("operation", "bad"),
    [
        ("paged_write", {"strip_rows": 24}),
        ("paged_write", {"strip_rows": 8}),
        ("paged_attention", {"decode_pages": 0}),
        ("paged_gather", {"in_flight": 0}),
        ("paged_copy", {"in_flight": 0}),
        ("merge_attention_states", {"rows": 100}),
    ],
)
def test_what_no_program_can_be_made_of_is_an_error(operation: str, bad: dict[str, int]) -> None:
    """Not a NotImplementedError: another form would run, and be tuned in this one's name."""
    with forced(operation, **bad), pytest.raises(ValueError, match=rf"{operation}, mosaic_tpu: got .*want"):
        _program(operation)


@pytest.mark.parametrize("name", SHAPES)
def test_the_heuristic_stays_within_the_buffers(name: str) -> None:
    shape = SHAPES[name]
    width = -(-shape.head_dim // 128) * 128
    page_bytes = 2 * shape.kv_heads * 16 * width * 2
    chosen = heuristic(shape.kv_heads, shape.q_heads // shape.kv_heads, 16, page_bytes)
    assert chosen["decode_pages"] == chosen["prefill_pages"] >= 8
    assert 2 * chosen["decode_pages"] * page_bytes <= 8 * 2**20
    assert chosen["prefill_queries"] * shape.q_heads <= 4096
    assert chosen["prefill_queries"].bit_count() == 1
