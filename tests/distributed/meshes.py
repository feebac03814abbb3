"""Meshes of virtual CPU devices."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh


def cpu_mesh(**sizes: int) -> Mesh:
    """A mesh of the first devices, axes named and sized by the arguments."""
    return _mesh(sizes, AxisType.Auto)


def explicit_mesh(**sizes: int) -> Mesh:
    """The same with axes of the type that ``jax.make_mesh`` gives them if none is asked for."""
    return _mesh(sizes, AxisType.Explicit)


def _mesh(sizes: dict[str, int], kind: AxisType) -> Mesh:
    devices = jax.devices("cpu")[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices)
