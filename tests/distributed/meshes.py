"""Meshes of virtual CPU devices."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh


def cpu_mesh(**sizes: int) -> Mesh:
    """A mesh of the first devices, axes named and sized by the arguments."""
    devices = jax.devices("cpu")[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
