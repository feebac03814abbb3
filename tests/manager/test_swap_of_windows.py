"""A request comes back from host memory with places whose block was out of sight and holds nothing now."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup, ManagerOptions

BLOCK, WINDOW = 4, 5
CONFIG = KVCacheConfig(
    num_layers=2,
    num_heads=1,
    head_dim=2,
    num_blocks=48,
    block_size=BLOCK,
    max_num_reqs=4,
    max_model_len=64,
    layer_groups=(LayerGroup((0,), sliding_window=WINDOW), LayerGroup((1,))),
)
PROMPT = np.arange(1, 41)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_what_came_back_empty_is_not_cached(times: int, forked: bool, count: int) -> None:
    manager = KVCacheManager(CONFIG, ManagerOptions(num_host_blocks=24))
    manager.add_request("a", PROMPT)
    manager.step(["a"], [40], num_rows=4, num_tokens=64)
    manager.step(["a"], [1], num_rows=4)
    assert manager.get_block_table("a", 0)[:9] == [-1] * 9
    manager.reset_prefix_cache()
    for _ in range(times):
        manager.preempt("a", "swap")
        assert manager.stats().num_free_host_blocks == 24 - 11 - 2  # what the window sees, and everything
        manager.step(["a"], [count], num_rows=4)
    if forked:
        manager.fork("a", "b")
        manager.free("a")
    manager.step(manager.request_ids(), [1], num_rows=4)
    manager.add_request("short", PROMPT[:12])
    manager.add_request("long", np.append(PROMPT, [7, 7]))
    assert manager.lookup_prefix("short").num_tokens == 0
    assert manager.lookup_prefix("long").num_tokens == 40  # the window's last blocks, and all of the other group
    manager.check_invariants()
