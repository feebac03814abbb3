"""Tables and pools on the host's CPU: how they get there, and how a step over them is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from pyagent_kv_jax.config import DeviceType

Made = TypeVar("Made")

CONTROL_STEP_ON_CPU: dict[str, str | bool | int] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",
}
"""``compiler_options`` for the outermost ``jax.jit`` of such a step: operations one after another, by one thread.

It is some fifty operations of half a microsecond. As it is, XLA hands those that don't depend on each other out to
threads, and splits some by the size of the arrays they update; waking a thread costs more than the work. With both
options a decode step of 256 requests takes the manager 63 us instead of 96, on 2 cores.

Where XLA still knows how, all operations become one LLVM module: as fast, and compiled in half the time.
"""
if jax.__version_info__ < (0, 11):
    CONTROL_STEP_ON_CPU |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def made_on_host(make: Callable[[], Made]) -> Made:
    """What ``make`` builds of arrays, committed to the host's XLA CPU device: numpy arguments of calls follow it there.

    Raises:
        DeviceUnavailableError: JAX's CPU backend is hidden.
    """
    host = DeviceType.CPU.devices()[0]
    with jax.default_device(host):
        made = make()
    return jax.device_put(made, host)
