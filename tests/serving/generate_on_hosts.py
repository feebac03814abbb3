"""A process of ``test_several_hosts``: ``python -m tests.serving.generate_on_hosts PORT INDEX COUNT CASE``."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

PROCESS_DEVICES = 2


def main(port: str, index: int, count: int, case: str) -> None:
    """Join the others, generate on a mesh of all devices, and print what came of it as a line of JSON."""
    jax.config.update("jax_num_cpu_devices", PROCESS_DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

    from jax.sharding import AxisType

    from pyagent_kv_jax import KVCacheError
    from pyagent_kv_jax.serving import SamplingParams, generate, several_hosts
    from tests.serving.serving_models import ragged_prompts, small_model

    mesh = jax.make_mesh((PROCESS_DEVICES, count), ("tp", "dcp"), axis_types=(AxisType.Auto,) * 2)
    prompts = ragged_prompts(4, longest=40)
    sampling = SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3)
    several_hosts.STEPS_BETWEEN_CHECKS = 4
    if case == "drift" and index:
        arrays = several_hosts.SamplingArrays
        several_hosts.SamplingArrays = lambda **fields: arrays(**{**fields, "seed": fields["seed"] + np.uint32(1)})
    if case == "other prompts":
        prompts = ragged_prompts(4, seed=index, longest=40)
    if case == "a token outside":
        prompts = [[10_000]]
    try:
        results = generate(small_model(), prompts, sampling=sampling, mesh=mesh, max_num_seqs=8, token_budget=32)
        said = [[answer.token_ids for answer in (result, *result.other_samples)] for result in results]
    except KVCacheError as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
