"""Copies that drifted apart are found; parts that differ by right are not taken for drift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.distributed.replicas import check_replicas
from pyagent_kv_jax.errors import InvalidArgumentError, ReplicaDriftError

MESH = jax.make_mesh((2, 3), ("own", "copy"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:6])


def placed(value: np.ndarray, spec: P, *, drift: int | None = None) -> jax.Array:
    """``value`` on the mesh; the copy on one device with a bit flipped."""
    sharding = NamedSharding(MESH, spec)
    parts = []
    for place, (device, index) in enumerate(sharding.devices_indices_map(value.shape).items()):
        part = value[index].copy()
        if place == drift:
            part.view(np.uint32).ravel()[0] ^= 1
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)


def test_equal_copies_pass() -> None:
    value = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    value[0, 0] = np.nan  # equal as bits
    tree = {"all": placed(value, P()), "own": placed(value, P("own")), "both": placed(value, P("own", "copy"))}
    check_replicas([tree, np.arange(3), 5], MESH)
    check_replicas({}, MESH)


@pytest.mark.parametrize(("spec", "drift", "other"), [(P(), 4, 0), (P("own"), 5, 3), (P(None, "copy"), 4, 1)])
def test_drift_names_the_leaf_and_the_device(spec: P, drift: int, other: int) -> None:
    value = np.random.default_rng(1).integers(0, 99, (4, 6)).astype(np.int32)
    tree = {"fine": placed(value, P()), "rows": [placed(value, spec, drift=drift)]}
    devices = list(MESH.devices.flat)
    message = rf"\['rows'\]\[0\]: got other bits on {devices[drift]} than on {devices[other]}.*1 of 2 arrays differ"
    with pytest.raises(ReplicaDriftError, match=message):
        check_replicas(tree, MESH)


def test_what_cannot_be_compared() -> None:
    stranger = jax.device_put(np.ones(2), jax.devices("cpu")[7])
    with pytest.raises(InvalidArgumentError, match=r"\['x'\]: got an array on .*want one on devices of the mesh"):
        check_replicas({"x": stranger}, MESH)
    with pytest.raises(InvalidArgumentError, match="got a traced array"):
        jax.jit(lambda x: check_replicas(x, MESH))(jnp.ones(2))
