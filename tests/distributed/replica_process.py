"""One of two processes that share a mesh: allocate alike, then let copies drift. See test_replicas_over_processes."""

from __future__ import annotations

import json
import os
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.distributed.owned import DistributedBlockTable
from pyagent_kv_jax.distributed.replicas import check_replicas
from pyagent_kv_jax.errors import OutOfBlocksError, ReplicaDriftError


def main(process: int, port: str) -> dict[str, object]:
    """What this process saw."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = jax.make_mesh((4,), ("own",), axis_types=(AxisType.Auto,), devices=jax.devices())
    config = BlockTableConfig(block_size=4, max_num_reqs=4, max_num_blocks_per_req=8)
    table = DistributedBlockTable.create(config, 4, num_blocks=16, mesh=mesh, axis="own")
    table, given = table.allocate_blocks([0, 1], [3, 6], devices=[1, 3])
    seen: dict[str, object] = {"ids": np.asarray(given.ids)[:9].tolist(), "free": np.asarray(table.num_free).tolist()}
    try:
        table.allocate_blocks([2, 3], [6, 6])
    except OutOfBlocksError as error:
        seen["refused"] = str(error)
    table.check_invariants()
    check_replicas((table, np.arange(3)), mesh)  # on the host, too, both have the same

    parts = [np.array([1, 2 + (process == 1 and place == 1)]) for place in range(2)]  # one copy of four is another
    copies = [jax.device_put(part, device) for part, device in zip(parts, mesh.local_devices, strict=True)]
    drifted = jax.make_array_from_single_device_arrays((2,), NamedSharding(mesh, P()), copies)
    for name, tree in (("device", {"table": table, "copy": drifted}), ("host", {"lens": np.arange(3) + process})):
        try:
            check_replicas(tree, mesh)
        except ReplicaDriftError as error:
            seen[name] = str(error)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])), flush=True)
    jax.distributed.shutdown()  # together: a process that loses the other before it has printed would be ended
    os._exit(0)
