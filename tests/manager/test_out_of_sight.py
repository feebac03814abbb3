"""Which blocks a request still holds: all that its next token sees, and none of those before."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup

BLOCK, WINDOW, CHUNK = 4, 5, 8
CONFIG = KVCacheConfig(
    num_layers=3,
    num_heads=1,
    head_dim=2,
    num_blocks=48,
    block_size=BLOCK,
    max_num_reqs=4,
    max_model_len=64,
    layer_groups=(LayerGroup((0,), sliding_window=WINDOW), LayerGroup((1,), chunk_size=CHUNK), LayerGroup((2,))),
)


@pytest.mark.parametrize("length", range(1, 18))
def test_the_first_block_held(length: int) -> None:
    manager = KVCacheManager(CONFIG)
    manager.allocate("a", length)
    manager.step(["b"], [1], num_rows=4)  # in which the blocks come back
    seen = [max(length - WINDOW + 1, 0), length // CHUNK * CHUNK, 0]
    for layer, first_seen in enumerate(seen):
        table = np.array(manager.get_block_table("a", layer))
        assert len(table) == -(-length // BLOCK)
        np.testing.assert_array_equal(table >= 0, np.arange(len(table)) >= first_seen // BLOCK)
    manager.check_invariants()
