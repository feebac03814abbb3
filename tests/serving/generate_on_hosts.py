"""A process of ``test_several_hosts``: ``python -m tests.serving.generate_on_hosts PORT INDEX COUNT``."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

PROCESS_DEVICES = 2


def main(port: str, index: int, count: int) -> None:
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
    config = CONFIG.kv_cache_config(num_blocks=256, block_size=4, max_num_reqs=8, max_model_len=64)
    sharding, prompts = CacheSharding.of(mesh), ragged_prompts(4, longest=40)
    backend = KVCacheManager(config, sharding=sharding)
    calls = [
        ("first", prompts, {"backend": backend}),
        ("again", prompts, {"backend": backend}),
        ("other prompts", ragged_prompts(4, seed=index, longest=40), {"mesh": mesh}),
        ("a token outside", [[10_000]], {"mesh": mesh}),
        ("too few rows", prompts, {"cache_config": dataclasses.replace(config, max_num_reqs=4), "mesh": mesh}),
        ("drift", prompts, {"backend": KVCacheManager(config, sharding=sharding)}),
    ]
    sampling, said = SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3), {}
    for name, asked, options in calls:
        if name == "drift" and index:
            several_hosts.SamplingArrays = _other_seeds
        try:
            results = generate(small_model(), asked, sampling=sampling, max_num_seqs=8, token_budget=32, **options)
            said[name] = [[answer.token_ids for answer in (result, *result.other_samples)] for result in results]
        except KVCacheError as error:
            said[name] = [type(error).__name__, str(error)]
    print(json.dumps(said), flush=True)


def _other_seeds(**fields: Any) -> Any:
    from pyagent_kv_jax.serving.sampling import SamplingArrays

    return SamplingArrays(**{**fields, "seed": fields["seed"] + np.uint32(1)})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
