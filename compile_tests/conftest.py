"""Eight virtual CPU devices: kernels that are interpreted wait for each other in as many threads of XLA's."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
