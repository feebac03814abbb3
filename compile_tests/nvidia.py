"""Compile for NVIDIA GPUs that are not there, down to machine code, and read what the compiler says about it.

Wants ``jax[cuda12-local]``, and ptxas from ``nvidia-cuda-nvcc-cu12`` or a CUDA toolkit; ``JAX_PLATFORMS=cpu``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

TARGETS = Path(__file__).with_name("targets")


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for; ``file`` holds its GpuTargetConfigProto, ``arch`` is what ptxas calls it."""

    file: str
    kind: str
    cores: int
    arch: str


GPUS = {
    "sm_80": Target("sm80.txtpb", "NVIDIA A100-SXM4-80GB", 108, "sm_80"),
    "sm_90": Target("sm90.txtpb", "NVIDIA H100 80GB HBM3", 132, "sm_90a"),
    "sm_100": Target("sm100.txtpb", "NVIDIA B200", 148, "sm_100a"),
    # A program has less than half the shared memory there.
    "sm_89": Target("sm89.txtpb", "NVIDIA L4", 58, "sm_89"),
    "sm_120": Target("sm120.txtpb", "NVIDIA RTX PRO 6000", 188, "sm_120a"),
}
SERVERS = ["sm_80", "sm_90", "sm_100"]


@functools.cache
def sharding(gpu: str) -> SingleDeviceSharding:
    """Everything on the one device that is not there."""
    text = (TARGETS / GPUS[gpu].file).read_text()
    topology = topologies.get_topology_desc(gpu, platform="cuda", target_config=text, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


def compile_for(
    gpu: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), dump: Path | None = None
) -> Any:
    """``function`` compiled for ``gpu``; ``arguments`` are trees of ``ShapeDtypeStruct``; the PTX goes to ``dump``."""
    device = AbstractDevice(device_kind=GPUS[gpu].kind, num_cores=GPUS[gpu].cores, platform="gpu")
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(gpu)), arguments)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function, donate_argnums=donate).trace(*placed).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options={"xla_dump_to": str(dump)} if dump else None)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes of the chip."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def resources(dump: Path, gpu: str) -> list[Resources]:
    """Of every kernel whose PTX lies in ``dump``, as ptxas counts them."""
    found = []
    for ptx in sorted(dump.glob("*.ptx")):
        if not ptx.stat().st_size:  # XLA's module of constants
            continue
        run = subprocess.run(
            [ptxas(), f"-arch={GPUS[gpu].arch}", "-v", str(ptx), "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        )
        found += _parse(run.stdout + run.stderr)
    return found


def resources_of_mosaic(dump: Path) -> list[Resources]:
    """Of every Mosaic GPU kernel whose assembler's report lies in ``dump`` (``MOSAIC_GPU_DUMP_PTXAS``)."""
    return [kernel for report in sorted(dump.glob("*.ptxas")) for kernel in _parse(report.read_text())]


def _parse(report: str) -> list[Resources]:
    found = []
    for part in report.split("Compiling entry function")[1:]:
        name = part.split("'")[1]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Resources(name, registers, spills, int(shared[1]) if shared else 0))
    return found


def offset_widths(dump: Path, kernel: str, parameter: int) -> set[int]:
    """Bytes of the elements that ``kernel`` counts in, where it adds an offset to a pointer it was given.

    0 for an offset that was made otherwise than by a multiplication of 32 bits by those bytes to 64 bits.
    """
    text = next(text for text in (ptx.read_text() for ptx in dump.glob("*.ptx")) if f".entry {kernel}(" in text)
    pointers = set(re.findall(rf"ld\.param\.[bu]64\s+(%rd\d+), \[{kernel}_param_{parameter}\]", text))
    for copy, pointer in re.findall(r"cvta\.to\.global\.u64\s+(%rd\d+), (%rd\d+)", text):
        pointers |= {copy} if pointer in pointers else set()
    wide = dict(re.findall(r"mul\.wide\.[su]32\s+(%rd\d+), %r\d+, (\d+)", text))
    added = re.findall(r"add\.s64\s+%rd\d+, (%rd\d+), (%rd\d+)", text)
    return {int(wide.get(offset, 0)) for pointer, offset in added if pointer in pointers}


def ptxas() -> str:
    """The assembler, of a CUDA toolkit or of the wheel ``nvidia-cuda-nvcc-cu12``."""
    try:
        import nvidia.cuda_nvcc as wheel

        found = Path(next(iter(wheel.__path__))) / "bin" / "ptxas"
        if found.exists():
            return str(found)
    except ImportError:
        pass
    found = shutil.which("ptxas")
    if not found:
        raise FileNotFoundError("ptxas: install nvidia-cuda-nvcc-cu12 or a CUDA toolkit")
    return found
