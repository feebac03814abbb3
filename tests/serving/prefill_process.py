"""A prefill process for tests: ``python -m tests.serving.prefill_process TOKEN``; its address goes to stdout."""

from __future__ import annotations

import os
import sys
import threading

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.distributed.handoff.control_channel import Timeouts
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.handoff import PrefillServer
from tests.serving.serving_models import CONFIG, small_model

SIZES = EngineConfig(max_num_seqs=4, token_budget=32)
TIMEOUTS = Timeouts(heartbeat=0.5, peer_timeout=10.0, connect=60.0)
NAME = "small"


def make_engine() -> Engine:
    cache = CONFIG.kv_cache_config(num_blocks=48, block_size=8, max_num_reqs=8, max_model_len=96)
    return Engine(small_model(), KVCacheManager(cache), SIZES)


def main() -> None:
    # Whoever started it is gone once stdin ends; then it must not live on.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server = PrefillServer(make_engine(), NAME, sys.argv[1], timeouts=TIMEOUTS)
    print(server.address, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
