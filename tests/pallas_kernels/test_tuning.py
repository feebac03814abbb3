"""Where kernel parameters come from, and which GPU they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import tuning
from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.paged_attention.triton_parameters import Parameters, heuristic
from pallas_kernels.tuning import forced, parameters, shape_key

SHAPE = {"head_dim": 128, "group": 4}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"paged_gather": {"triton": {"some GPU": {"group=4,head_dim=128": {"words": 64}}}}}
    (tmp_path / "tuning.json").write_text(json.dumps(entries))
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


def test_shape_key_does_not_depend_on_order() -> None:
    assert shape_key(SHAPE) == shape_key(dict(reversed(SHAPE.items()))) == "group=4,head_dim=128"


@pytest.mark.usefixtures("table")
def test_table_overrules_the_heuristic_and_forced_the_table() -> None:
    rule = {"words": 1, "num_warps": 8}
    ask = ("paged_gather", "triton")
    assert parameters(*ask, "some GPU", SHAPE, rule) == {"words": 64, "num_warps": 8}
    assert parameters(*ask, "another", SHAPE, rule) == rule
    assert parameters(*ask, "some GPU", {**SHAPE, "group": 1}, rule) == rule
    with forced("paged_gather", words=3), forced("paged_gather", num_warps=2), forced("paged_copy", words=9):
        assert parameters(*ask, "some GPU", SHAPE, rule) == {"words": 3, "num_warps": 2}
    with forced("paged_gather", wrods=3), pytest.raises(ValueError, match=r"wrods.*words"):
        parameters(*ask, "some GPU", SHAPE, rule)


def test_the_table_that_is_shipped_can_be_read() -> None:
    tuning.table.cache_clear()
    assert isinstance(tuning.table(), dict)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA H200", 90),
        ("NVIDIA GH200 480GB", 90),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA B200", 100),
        ("NVIDIA L40S", 89),
        ("NVIDIA L4", 89),
    ],
)
def test_a_gpu_that_is_not_there_is_known_by_its_name(kind: str, capability: int) -> None:
    device = AbstractDevice(device_kind=kind, num_cores=7, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        gpu = target_gpu()
    assert (gpu.kind, gpu.capability, gpu.cores, gpu.interpret) == (kind, capability, 7, False)
    assert gpu.converts_fp8 == (capability >= 89)


def test_a_small_batch_is_split_until_it_fills_the_gpu() -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", 90, 132)
    chosen = Parameters(**heuristic(gpu, head_dim=128, dot_itemsize=2, kv_itemsize=2))
    assert chosen.splits(gpu, programs=8, longest_context=131072) * 8 >= 132 * chosen.programs_per_core
    assert chosen.splits(gpu, programs=4096, longest_context=131072) == 1
    assert chosen.splits(gpu, programs=1, longest_context=200) == 1
    assert chosen.splits(gpu, programs=1, longest_context=1000) == 4
