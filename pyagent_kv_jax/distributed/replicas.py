"""Whether what several devices hold copies of is the same on all of them, bit for bit."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.errors import InvalidArgumentError, ReplicaDriftError, is_concrete

_WORDS = 8  # of a SHA-256 digest


def check_replicas(tree: Any, mesh: Mesh) -> None:
    """Raise unless all copies of every array in ``tree`` are the same bits. To be called by all processes of the mesh.

    Two devices hold copies where the array's sharding gives them the same part: of a replicated array all do, of one
    sharded over an axis those that differ on other axes. Each process hashes what its devices hold, and the digests are
    all-gathered over the mesh, so that every process comes to the same verdict. Costs a copy of each part to the host.

    Args:
        tree: of arrays on devices of ``mesh``. What lies in host memory (numpy, plain numbers) counts as held by all
            devices of the process.
        mesh: whose devices are compared.

    Raises:
        ReplicaDriftError: copies differ; names the first such leaf, the devices and how many leaves there are in all.
        InvalidArgumentError: traced arrays, or one on a device that is not of the mesh.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    devices = list(mesh.devices.flat)
    for name, leaf in leaves:
        _check_leaf(name, leaf, devices)
    if not leaves:
        return
    digests = _gathered(_own_digests([leaf for _, leaf in leaves], devices), mesh)
    drifted = []
    for index, (name, leaf) in enumerate(leaves):
        first: dict[Any, int] = {}
        for place, part in _parts(leaf, devices).items():
            original = first.setdefault(part, place)
            if not np.array_equal(digests[place, index], digests[original, index]):
                drifted.append((name, devices[place], devices[original]))
                break
    if drifted:
        name, device, other = drifted[0]
        raise ReplicaDriftError(
            f"{name}: got other bits on {device} than on {other}, want the same on both; "
            f"{len(drifted)} of {len(leaves)} arrays differ"
        )


def _check_leaf(name: str, leaf: Any, devices: list[jax.Device]) -> None:
    if not is_concrete(leaf):
        raise InvalidArgumentError(f"{name}: got a traced array, want a call outside jit")
    strangers = set(leaf.sharding.device_set) - set(devices) if isinstance(leaf, jax.Array) else set()
    if strangers:
        listed = sorted(str(device) for device in strangers)
        raise InvalidArgumentError(f"{name}: got an array on {listed}, want one on devices of the mesh")


def _parts(leaf: Any, devices: list[jax.Device]) -> dict[int, Any]:
    """Place of a device in the mesh -> which part of the array it holds; those that hold none are left out."""
    if not isinstance(leaf, jax.Array):
        return dict.fromkeys(range(len(devices)), 0)
    indices = leaf.sharding.devices_indices_map(leaf.shape)
    parts = {device: tuple(s.indices(n) for s, n in zip(i, leaf.shape, strict=True)) for device, i in indices.items()}
    return {place: parts[device] for place, device in enumerate(devices) if device in parts}


def _own_digests(leaves: list[Any], devices: list[jax.Device]) -> dict[int, np.ndarray]:
    """Place of each of this process's devices -> uint32[leaves, 8]; zeros where it holds nothing of a leaf."""
    process = jax.process_index(devices[0].client)
    places = {device: place for place, device in enumerate(devices) if device.process_index == process}
    digests = {place: np.zeros((len(leaves), _WORDS), np.uint32) for place in places.values()}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                digests[places[shard.device]][index] = _digest(np.asarray(shard.data))
        else:
            for place in digests:
                digests[place][index] = _digest(np.asarray(leaf))
    return digests


def _digest(array: np.ndarray) -> np.ndarray:
    described = f"{array.dtype}{array.shape}".encode()
    hashed = hashlib.sha256(described + np.ascontiguousarray(array).tobytes())
    return np.frombuffer(hashed.digest(), np.uint32)


def _gathered(own: dict[int, np.ndarray], mesh: Mesh) -> np.ndarray:
    """uint32[devices, leaves, 8] of all devices of the mesh, from those of each process."""
    devices = list(mesh.devices.flat)
    rows = [jax.device_put(digests[None], devices[place]) for place, digests in own.items()]
    spread = NamedSharding(mesh, P(mesh.axis_names))
    shape = (len(devices), *next(iter(own.values())).shape)
    table = jax.make_array_from_single_device_arrays(shape, spread, rows)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(table)
    return np.asarray(everywhere.addressable_data(0))
