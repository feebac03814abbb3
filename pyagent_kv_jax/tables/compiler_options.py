"""How to compile a step over tables and pools for the host's CPU."""

from __future__ import annotations

# Such a step is some fifty operations of a microsecond or less. XLA judges them by the size of the arrays they update
# and splits them over threads, whose waking costs more than the work. For the outermost ``jax.jit`` only.
CONTROL_STEP_ON_CPU: dict[str, str] = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
