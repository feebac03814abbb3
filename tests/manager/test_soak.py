"""The soak script: a short run finds nothing, and what it is there to find it finds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_manager.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_manager", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def soak(script: ModuleType) -> object:
    """After enough steps that everything is going on at once."""
    soak = script.Soak()
    for _ in range(40):
        soak.step()
    soak.check()
    return soak


def test_a_short_run(script: ModuleType, soak: object) -> None:
    report = script.run(60, soak=soak)
    assert report.faults(growth_bound=np.inf) == []
    assert report.lost_blocks == report.lost_host_blocks == 0
    happened = {
        "added",
        "cached blocks evicted",
        "cancelled: waiting",
        "drafts rejected",
        "finished",
        "forks",
        "preempted: swap",
        "prompt tokens found",
        "refused",
        "swapped in",
    }
    assert happened <= {name for name, count in report.counts.items() if count}
    json.dumps(report.counts)


def test_a_lost_block_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = script.Soak()
    space = soak.manager._state.swap
    soak.manager.allocate("a", 5)
    monkeypatch.setattr(space, "release", lambda ids: None)
    soak.manager.preempt("a", "swap")
    soak.manager.free("a")
    report = script.run(1, soak=soak)
    assert report.lost_host_blocks == 4
    assert report.faults(np.inf) == ["lost 0 blocks and 4 host blocks"]


def test_growth_is_a_fault(script: ModuleType) -> None:
    flat = script.Report(
        steps=1,
        seed=0,
        steps_per_second=1.0,
        compilations=0,
        compilations_in_second_half=0,
        rss_warm=100.0,
        rss_end=104.0,
        rss_slope_per_million_steps=0.0,
        lost_blocks=0,
        lost_host_blocks=0,
        counts={},
    )
    assert flat.faults() == []
    assert "grew by 4.0 MiB" in flat.faults(growth_bound=3.0)[0]


def test_a_wrong_number_is_found(script: ModuleType) -> None:
    soak = script.Soak()
    for _ in range(3):
        soak.step()
    soak.check()
    request = soak._at("device")[0]
    request.stored[request.computed - 1] += 1
    with pytest.raises(AssertionError, match=request.name):
        soak.check()
