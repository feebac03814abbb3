"""Which form runs, and what is said when none can."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import numpy as np
import pytest

from pallas_kernels import (
    IMPLEMENTATIONS,
    ArgumentError,
    merge_attention_states,
    paged_attention,
    paged_copy,
    paged_gather,
    paged_write,
)
from pallas_kernels.dispatch import Operation

PAGES = np.ones((3, 1, 2, 4), np.float32)
IDS = np.array([0], np.int32)
CALLS: list[Callable[..., object]] = [
    lambda **kw: paged_gather(PAGES, IDS, **kw),
    lambda **kw: paged_copy(PAGES, IDS, IDS, **kw),
    lambda **kw: paged_write(PAGES, PAGES, PAGES[:1, :, 0], PAGES[:1, :, 0], IDS, **kw),
    lambda **kw: paged_attention(PAGES[:1, :, 0], PAGES, PAGES, IDS[None], IDS + 1, **kw),
    lambda **kw: merge_attention_states(PAGES, PAGES[..., 0], **kw),
]
NAMES = ["gather", "copy", "write", "attention", "merge"]


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Operation:
    """An operation of three forms: Triton cannot, Mosaic TPU fails, XLA can."""

    def module(name: str, function: Callable[[str], str]) -> str:
        form = types.ModuleType(name)
        form.echo = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, form)
        return name

    def cannot(text: str) -> str:
        raise NotImplementedError("no GPU here")

    def fails(text: str) -> str:
        raise ValueError("a real mistake")

    return Operation(
        "echo",
        {
            "triton": module("echo_triton", cannot),
            "mosaic_tpu": module("echo_tpu", fails),
            "xla": module("echo_xla", lambda text: f"xla {text}"),
        },
    )


def test_only_not_implemented_moves_on(operation: Operation) -> None:
    assert operation("xla", "hello") == "xla hello"
    assert operation(("triton", "xla"), "hello") == "xla hello"
    assert operation(["mosaic_gpu", "triton", "xla"], "hello") == "xla hello"
    with pytest.raises(ValueError, match="a real mistake"):
        operation(("triton", "mosaic_tpu", "xla"), "hello")


def test_none_tries_the_most_special_form_first(operation: Operation) -> None:
    with pytest.raises(ValueError, match="a real mistake"):
        operation(None, "hello")


def test_the_reason_of_each_is_told(operation: Operation) -> None:
    with pytest.raises(NotImplementedError, match=r"echo .*'triton': no GPU here"):
        operation("triton", "hello")
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu': there is no such form.*'triton': no GPU here"):
        operation(("mosaic_gpu", "triton"), "hello")


def test_a_form_is_registered_under_a_known_name() -> None:
    with pytest.raises(ArgumentError, match="cuda"):
        Operation("echo", {"cuda": "echo_cuda"})


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
@pytest.mark.parametrize("wrong", ["cuda", "", "XLA", (), ("xla", "tpu"), 3, (None,)], ids=repr)
def test_unknown_implementations(call: Callable[..., object], wrong: object) -> None:
    with pytest.raises(ArgumentError, match="implementation: got"):
        call(implementation=wrong)


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_xla_and_the_default_run_here(call: Callable[..., object]) -> None:
    for implementation in (None, "xla", IMPLEMENTATIONS, ["xla"]):
        call(implementation=implementation)
