"""What the manager shows of blocks: who holds which, where, and that a view is a snapshot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pyagent_kv_jax import (
    BlockInfo,
    DeviceType,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheBlocks,
    KVCacheConfig,
    KVCacheManager,
    LayerGroup,
    ManagerOptions,
    UnknownRequestError,
)

CONFIG = KVCacheConfig(
    num_layers=3, num_heads=1, head_dim=2, num_blocks=24, block_size=4, max_num_reqs=4, max_model_len=64, device="cpu"
)
WINDOWED = dataclasses.replace(CONFIG, layer_groups=(LayerGroup((0, 2), sliding_window=5), LayerGroup((1,))))


def make(config: KVCacheConfig = CONFIG) -> KVCacheManager:
    return KVCacheManager(config, ManagerOptions(num_host_blocks=16))


def test_blocks_on_the_device() -> None:
    manager = make()
    a, b = manager.allocate("a", 9), manager.allocate("b", 4)
    assert manager.blocks("a") == manager.blocks("a", 2) == KVCacheBlocks(tuple(a), ())
    assert manager.blocks("b") == KVCacheBlocks(tuple(b), ())
    before = manager.blocks("a")
    manager.extend("a", 4)
    assert before.gpu_block_ids == tuple(a)
    assert manager.blocks("a").num_blocks() == 4


def test_blocks_of_each_group_without_those_given_back() -> None:
    manager = make(WINDOWED)
    manager.allocate("a", 16)
    manager.step(["a"], [1], num_rows=4)  # the window has left the first three blocks
    table = manager.get_block_table("a", 0)
    assert table[:3] == [-1, -1, -1]
    assert manager.blocks("a", 2) == KVCacheBlocks(tuple(table[3:]), ())
    assert manager.blocks("a", 1) == KVCacheBlocks(tuple(manager.get_block_table("a", 1)), ())
    assert manager.blocks("a", 1).num_blocks() == 5


def test_blocks_on_the_host_and_back() -> None:
    manager = make(WINDOWED)
    manager.allocate("before", 8)
    manager.preempt("before", "swap")  # so that ids of host and device differ
    manager.allocate("a", 16)
    manager.step(["a"], [1], num_rows=4)
    assert manager.preempt("a", "swap") == {"a": "swap"}
    local, full = manager.blocks("a", 0), manager.blocks("a", 1)
    assert local.gpu_block_ids == full.gpu_block_ids == ()
    assert (len(local.cpu_block_ids), len(full.cpu_block_ids)) == (2, 5)
    held = (*local.cpu_block_ids, *full.cpu_block_ids, *manager.blocks("before", 0).cpu_block_ids)
    held += manager.blocks("before", 1).cpu_block_ids
    assert len(set(held)) == len(held) == 16 - manager.stats().num_free_host_blocks
    manager.step(["a"], [1], num_rows=4)
    assert manager.blocks("a", 1) == KVCacheBlocks(tuple(manager.get_block_table("a", 1)), ())


def test_a_block_counts_its_holders() -> None:
    manager = make()
    block = manager.allocate("a", 9)[0]
    once = manager.block_info(block)
    assert once == BlockInfo(block, 1, DeviceType.CPU)
    manager.fork("a", "b")
    assert manager.block_info(np.int64(block)).ref_count == 2
    assert once.ref_count == 1  # a snapshot
    assert once.increment_ref() == manager.block_info(block)
    manager.free("a")
    manager.free("b")
    assert manager.block_info(block).can_free()


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (UnknownRequestError, lambda m: m.blocks("nobody"), "'nobody'"),
        (UnknownRequestError, lambda m: m.blocks("waits"), "'waits'"),
        (InvalidArgumentError, lambda m: m.blocks("a", 3), "layer_idx: got 3, want 0 to 2"),
        (InvalidArgumentError, lambda m: m.blocks("a", -1), "layer_idx: got -1"),
        (InvalidArgumentError, lambda m: m.blocks("a", 0.5), "layer_idx"),
        (InvalidArgumentError, lambda m: m.get_block_table("a", 0.5), "layer_idx"),
        (InvalidBlockError, lambda m: m.block_info(24), "got 24, want 0 to 23"),
        (InvalidBlockError, lambda m: m.block_info(-1), "got -1"),
        (InvalidArgumentError, lambda m: m.block_info("a"), "block_id"),
    ],
)
def test_what_is_not_there(error: type[Exception], call: object, wanted: str) -> None:
    manager = make()
    manager.allocate("a", 5)
    manager.add_request("waits", [1, 2, 3])
    with pytest.raises(error, match=wanted):
        call(manager)
    assert manager.blocks("a").num_blocks() == 2
