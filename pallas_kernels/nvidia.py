"""The NVIDIA GPU that a program is traced for: what its Triton forms may use, and how many programs fill it."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.interpret import interpret_mode, target_device, target_platform

# Devices that are not there are known by name alone. A name that is not here counts as the oldest we serve.
_CAPABILITIES = (
    (("B100", "B200", "GB200", "B300", "GB300"), 100),
    (("RTX 5090", "RTX PRO 6000"), 120),
    (("H100", "H200", "H800", "H20", "GH200"), 90),
    (("L4", "L40", "L40S", "RTX 4090", "RTX 6000 Ada"), 89),
)
_OLDEST = 80
# Of a thread block that asks for all it can have (CUDA Programming Guide); 101,376 on those not here: 8.6, 8.9, 12.0.
_SHARED_MEMORY = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        kind: its name, as JAX gives it; the key of the tuning table.
        capability: compute capability times ten: 80 for an A100, 90 for an H100.
        cores: streaming multiprocessors.
        interpret: whether kernels are interpreted instead of compiled.
    """

    kind: str
    capability: int
    cores: int
    interpret: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes that one program can have."""
        return _SHARED_MEMORY.get(self.capability, 101_376)

    @property
    def converts_fp8(self) -> bool:
        """Whether it has instructions to and from fp8; where it has none, the bits are moved by hand."""
        return self.capability >= 89


def target_gpu() -> Gpu:
    """The GPU the program under trace is for.

    Raises:
        NotImplementedError: it is for no NVIDIA GPU of compute capability 8.0 or more; says what it is for.
    """
    mode = interpret_mode()
    if mode:
        if mode is not True:
            raise NotImplementedError(f"Triton kernels are interpreted with interpret=True, not by {mode!r}")
        return Gpu("interpreted", capability=90, cores=4, interpret=True)
    platform = target_platform()
    if platform != "gpu":
        raise NotImplementedError(f"Triton kernels run on NVIDIA GPUs, and this program is for {platform!r}")
    device = target_device(platform)
    version = str(getattr(getattr(device, "client", None), "platform_version", ""))
    if "rocm" in version.lower():
        raise NotImplementedError("Triton kernels are written for NVIDIA GPUs, and this is one of AMD")
    gpu = Gpu(device.device_kind, _capability(device), getattr(device, "num_cores", 0) or _cores(device))
    if gpu.capability < _OLDEST:
        raise NotImplementedError(f"{gpu.kind} has compute capability {gpu.capability / 10}, want 8.0 or more")
    return gpu


def _capability(device: Any) -> int:
    real = getattr(device, "compute_capability", None)
    if real is not None:
        return round(float(real) * 10)
    words = device.device_kind.replace("-", " ")
    for names, capability in _CAPABILITIES:
        if any(f" {name} " in f" {words} " for name in names):
            return capability
    return _OLDEST


def _cores(device: Any) -> int:
    return getattr(device, "core_count", None) or 108
