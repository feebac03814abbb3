"""A process of ``test_several_hosts``: ``python -m tests.serving.generate_on_hosts PORT INDEX COUNT CASE``."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import numpy as np

PROCESS_DEVICES = 2


def main(port: str, index: int, count: int, case: str) -> None:
    """Join the others, generate on a mesh of all devices, and print what came of each call as a line of JSON."""
    jax.config.update("jax_num_cpu_devices", PROCESS_DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

    from jax.sharding import AxisType

    from pyagent_kv_jax import KVCacheError, KVCacheManager
    from pyagent_kv_jax.distributed import CacheSharding
    from pyagent_kv_jax.serving import SamplingParams, generate, several_hosts
    from tests.serving.serving_models import CONFIG, ragged_prompts, small_model

    mesh = jax.make_mesh((PROCESS_DEVICES, count), ("tp", "dcp"), axis_types=(AxisType.Auto,) * 2)
    several_hosts.STEPS_BETWEEN_CHECKS = 4
    if case == "drift" and index:
        arrays = several_hosts.SamplingArrays
        several_hosts.SamplingArrays = lambda **fields: arrays(**{**fields, "seed": fields["seed"] + np.uint32(1)})
    config = CONFIG.kv_cache_config(num_blocks=256, block_size=4, max_num_reqs=8, max_model_len=64)
    backend = KVCacheManager(config, sharding=CacheSharding.of(mesh))
    few_rows = {"cache_config": dataclasses.replace(config, max_num_reqs=4), "mesh": mesh}
    prompts = ragged_prompts(4, longest=40)
    calls = {
        "twice": [(prompts, {"backend": backend})] * 2,
        "other prompts": [(ragged_prompts(4, seed=index, longest=40), {"mesh": mesh})],
        "refused": [([[10_000]], {"mesh": mesh}), (prompts, few_rows)],
        "drift": [(prompts, {"mesh": mesh})],
    }
    sampling, said = SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3), []
    for asked, options in calls[case]:
        try:
            results = generate(small_model(), asked, sampling=sampling, max_num_seqs=8, token_budget=32, **options)
            said.append([[answer.token_ids for answer in (result, *result.other_samples)] for result in results])
        except KVCacheError as error:
            said.append([type(error).__name__, str(error)])
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
