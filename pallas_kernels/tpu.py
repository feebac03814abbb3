"""The TPU that a program is traced for."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.interpret import interpret_mode, target_device, target_platform


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU model.

    Attributes:
        kind: its name, as JAX gives it; the key of the tuning table.
        interpret: what to pass to ``pallas_call(interpret=...)``; False on a TPU.
    """

    kind: str
    interpret: Any = False


def target_tpu() -> Tpu:
    """The TPU the program under trace is for.

    Raises:
        NotImplementedError: it is for none, and kernels are not interpreted either.
    """
    mode = interpret_mode()
    if mode is not False:
        return Tpu("interpreted", mode)
    platform = target_platform()
    if platform != "tpu":
        raise NotImplementedError(f"Mosaic TPU kernels run on a TPU, and this is for a {platform}")
    return Tpu(target_device(platform).device_kind)
