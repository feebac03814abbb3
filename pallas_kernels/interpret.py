"""Where a Pallas kernel would run, and running it without that hardware.

A Pallas form asks two things before it builds its kernel: ``target_platform()``, the platform the program is
traced for, and ``interpret_mode()``, what to pass to ``pallas_call(interpret=...)``. Both are read outside any
``jit`` of the form's own and go into it as static arguments, so that a compiled program never outlives the
answer. A ``jit`` of the caller's is traced once: enter the context before its first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_MODE: ContextVar[Any] = ContextVar("pallas_interpret_mode", default=False)


@contextmanager
def interpret_pallas(mode: Any = True) -> Iterator[None]:
    """Inside, the Pallas forms interpret their kernels: any device will do, slowly. For tests.

    Args:
        mode: True, which is forgiving (every copy is done at once, an id out of range is clamped); or
            ``jax.experimental.pallas.tpu.InterpretParams()``, which models a TPU's memories and semaphores:
            a copy that nobody waited for has not happened, and an access out of range is an error. A form for
            another device refuses that one.
    """
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def interpret_mode() -> Any:
    """What ``pallas_call(interpret=...)`` shall be here; False outside ``interpret_pallas``."""
    return _MODE.get()


def target_platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what the program under trace is for.

    An abstract device in the mesh context (how one compiles for a device that is not there) wins over the default
    device, and that over the default backend.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        device = getattr(jax.config, "jax_default_device", None)
    platform = device if isinstance(device, str) else getattr(device, "platform", None)
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device(platform: str) -> Any:
    """The device of ``platform`` that the program under trace is for: an abstract one, the default, or the first."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract
    default = getattr(jax.config, "jax_default_device", None)
    return default if hasattr(default, "device_kind") else jax.local_devices(backend=platform)[0]
