"""Arrays put where a plan wants them, in one process or several, without a collective for those of the host."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def placed(array: Any, place: NamedSharding) -> jax.Array:
    """``array`` as ``place`` says; at no cost where it is there already.

    One of the host is the same in every process; ``device_put`` would compare them, by a collective.
    """
    if isinstance(array, jax.Array):
        return array if array.sharding == place else jax.device_put(array, place)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])
