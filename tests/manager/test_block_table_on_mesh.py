"""``BlockTableV2`` with a mesh: where blocks are, and what cannot be."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import (
    BlockAllocationStrategy,
    BlockTableFactory,
    BlockTableV2,
    ConfigError,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheConfig,
    OutOfBlocksError,
    ShapeMismatchError,
)
from pyagent_kv_jax.distributed.owned import OwnedKVPages, plan_spill, spill_of_row
from tests.distributed.meshes import cpu_mesh
from tests.manager.test_block_table_v2 import BLOCK, BLOCKS, CONFIG


def on_mesh(**options) -> BlockTableV2:
    return BlockTableV2(CONFIG, num_blocks=BLOCKS, mesh=cpu_mesh(own=3, other=2), axis="own", **options)


def test_a_row_stays_on_its_device_and_spills_to_the_one_with_most_left():
    v2 = on_mesh()
    assert v2.allocate_for_request("a", 0, 3, node=1).tolist() == [4, 5, 6]
    assert v2.allocate_for_request("b", 1, 1).tolist() == [0]  # where most is free, of equals the lowest
    assert v2.allocate_for_request("a", 0, 2).tolist() == [7, 8]
    assert v2.allocate_for_request("b", 1, 4, strategy=BlockAllocationStrategy.NUMA_AWARE, node=0).tolist() == [
        *(1, 2, 3),
        9,
    ]
    stats = v2.get_stats()
    assert (stats.num_used_by_device, stats.num_spilled, stats.num_free_blocks) == ((4, 4, 2), 2, 2)
    row = v2.get_row(0)
    assert v2.get_block_location(row).tolist() == [1, 1, 1, 1, 2]
    assert v2.get_block_location([[0, 11]]).tolist() == [[0, 2]]
    assert v2.is_local(row, 2).tolist() == [False] * 4 + [True]
    v2.free_request("a")
    assert v2.get_stats().num_used_by_device == (4, 0, 1)


def test_runs_on_a_mesh_are_on_one_device():
    v2 = on_mesh()
    v2.append_row(0, [1, 4], 8)
    contiguous = BlockAllocationStrategy.CONTIGUOUS
    assert v2.allocate_for_request("a", 1, 3, strategy=contiguous).tolist() == [8, 9, 10]
    assert v2.allocate_for_request("a", 1, 2, strategy=contiguous).tolist() == [2, 3]
    before = v2.get_stats()
    with pytest.raises(OutOfBlocksError, match=r"4 consecutive blocks, want at most 3, .* 5 free blocks on one device"):
        v2.allocate_for_request("b", 2, 4, strategy=contiguous)
    assert v2.get_stats() == before


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_for_a_row_is_that_for_a_batch(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        num_free = rng.integers(0, 4, 5)
        count, device = int(rng.integers(0, num_free.sum() + 1)), int(rng.integers(-1, 5))
        one = (np.array([x], np.int32) for x in (count, device))
        plan = plan_spill(jnp.asarray(num_free, jnp.int32), *one, np.ones(1, bool), 16)
        want = [(int(owner), len(list(blocks))) for owner, blocks in itertools.groupby(plan.owners[:count].tolist())]
        assert spill_of_row(num_free, count, device) == want


def test_slots_are_those_of_pages_on_the_devices():
    """What is written at the slots of a spilled row lies on the devices that its blocks are said to be on."""
    v2 = on_mesh(use_sparse=True)
    v2.append_row(2, [4, 5], 8)
    v2.allocate_for_request("a", 0, 4, node=1, num_tokens=15)
    sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "num_blocks": BLOCKS, "block_size": BLOCK}
    mesh = cpu_mesh(own=3, other=2)
    pages = OwnedKVPages.create(KVCacheConfig(**sizes, dtype="float32", device="cpu"), mesh, "own")
    k = np.random.default_rng(0).normal(size=(15, 2, 8)).astype(np.float32)
    pages = pages.write(0, k, -k, v2.compute_slot_mapping(0, 15, 0).slots)
    stored = {  # of each device of ``mesh``
        shard.device: np.asarray(shard.data).swapaxes(1, 2).reshape(-1, 2, 8)
        for shard in pages.k_pages.addressable_shards
    }
    blocks = v2.get_row(0)[:4]
    locations = v2.get_block_location(blocks).tolist()
    assert sorted(locations) == [0, 0, 1, 1]
    for column, (block, device) in enumerate(zip(blocks.tolist(), locations, strict=True)):
        tokens, first = k[column * BLOCK :][:BLOCK], block % 4 * BLOCK
        for copy in mesh.devices[device]:
            np.testing.assert_array_equal(stored[copy][first : first + len(tokens)], tokens)


def test_meshes_and_devices_that_are_not_there():
    for options, message in (
        ({"axis": "workers"}, r"axis: got 'workers', want one of the mesh's axes \('own', 'other'\)"),
        ({"num_blocks": 10}, "num_blocks: got 10, want a multiple of 3 devices"),
        ({"num_blocks": -3}, "num_blocks: got -3"),
        ({"num_nodes": 2}, "num_nodes: got 2 with a mesh, want 1: each device of axis 'own' is a node"),
    ):
        with pytest.raises(ConfigError, match=message):
            BlockTableFactory.create_v2(**({"mesh": cpu_mesh(own=3, other=2), "axis": "own"} | options))
    v2 = on_mesh()
    for call, error, message in (
        (lambda: v2.get_block_location([3, 12]), InvalidBlockError, r"block_id: got \[12\], want 0 to 11"),
        (lambda: v2.get_block_location([0.5]), ShapeMismatchError, "block_id: got float64"),
        (lambda: v2.is_local(3, 3), InvalidArgumentError, "device: got 3, want 0 to 2"),
        (lambda: v2.allocate_for_request("a", 0, 1, node=3), InvalidArgumentError, "node: got 3, want 0 to 2"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert BlockTableFactory.create_v2(mesh=cpu_mesh(own=7), axis="own").get_stats().num_blocks == 65_534
    plain = BlockTableV2(CONFIG, num_blocks=BLOCKS)
    assert (plain.get_block_location([3, 11]).tolist(), plain.is_local(3).tolist()) == ([0, 0], True)
    with pytest.raises(InvalidArgumentError, match="device: got 1, want 0 to 0"):
        plain.is_local(3, 1)
