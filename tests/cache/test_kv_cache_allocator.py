"""The allocator against plain dictionaries of reference counts, from many threads, and refusing what it must."""

from __future__ import annotations

import collections
import dataclasses
import threading

import numpy as np
import pytest

from pyagent_kv_jax import (
    BlockAllocationStrategy,
    ConfigError,
    DoubleFreeError,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheConfig,
    OutOfBlocksError,
)
from pyagent_kv_jax.cache.block_views import KVCacheBlock
from pyagent_kv_jax.cache.kv_cache_allocator import KVCacheAllocator
from pyagent_kv_jax.config import LayerGroup
from pyagent_kv_jax.pool import check_invariants

CONTIGUOUS, NUMA_AWARE = BlockAllocationStrategy.CONTIGUOUS, BlockAllocationStrategy.NUMA_AWARE
PREDICTIVE = BlockAllocationStrategy.PREDICTIVE
BLOCKS, HOST_BLOCKS = 13, 6
CONFIG = KVCacheConfig(num_layers=3, num_heads=2, head_dim=8, v_head_dim=4, num_blocks=BLOCKS, block_size=4)
GROUPED = dataclasses.replace(CONFIG, layer_groups=(LayerGroup((0, 2)), LayerGroup((1,), sliding_window=8)))


def check_free(allocator: KVCacheAllocator, gpu: int, cpu: int) -> None:
    assert allocator.get_num_free_gpu_blocks() == gpu
    assert allocator.get_num_free_cpu_blocks() == cpu
    for pool in allocator._pools.values():
        check_invariants(pool.pool)


def test_random_calls_against_reference_counts() -> None:
    """In the model: (on_host, id) -> references."""
    rng, allocator = np.random.default_rng(0), KVCacheAllocator(CONFIG)
    held: collections.Counter[tuple[bool, int]] = collections.Counter()
    views: list[KVCacheBlock] = []
    for _ in range(150):
        choice = rng.integers(4)
        if choice < 2:
            on_host = bool(choice)
            free, count = BLOCKS - sum(1 for where, _ in held if where == on_host), int(rng.integers(0, 6))
            call = allocator.allocate_cpu_blocks if on_host else allocator.allocate_gpu_blocks
            if count > free:
                with pytest.raises(OutOfBlocksError, match=f"{free} free"):
                    call(count)
                continue
            taken = call(count)
            assert len(taken) == count
            for block in taken:
                assert held[block.on_host, block.block_id] == 0
                assert (block.on_host, block.ref_count) == (on_host, 1)
                held[block.on_host, block.block_id] += 1
            views += taken
        elif choice == 2 and views:
            block = views[rng.integers(len(views))]
            views.append(allocator.share_block(block))
            held[block.on_host, block.block_id] += 1
        elif views:
            rng.shuffle(views)
            count = int(rng.integers(1, min(len(views), 16) + 1))
            dropped, views = views[:count], views[count:]
            assert [b.block_id for b in allocator.free_blocks(dropped)] == [b.block_id for b in dropped]
            held -= collections.Counter((b.on_host, b.block_id) for b in dropped)
        used = collections.Counter(on_host for on_host, _ in held)
        check_free(allocator, BLOCKS - used[False], BLOCKS - used[True])
        assert allocator.usage() == pytest.approx(used[False] / BLOCKS)


def test_a_view_says_what_the_block_is() -> None:
    allocator = KVCacheAllocator(GROUPED, HOST_BLOCKS)
    gpu, cpu = allocator.allocate_gpu_block(layer_idx=1), allocator.allocate_cpu_block(layer_idx=2)
    assert (gpu.on_host, gpu.group, cpu.on_host, cpu.group) == (False, 1, True, 0)
    assert gpu.device is GROUPED.device
    assert gpu.k_shape == (2, 2, 4, 8)
    assert gpu.v_shape == (2, 2, 4, 4)
    assert gpu.nbytes == cpu.nbytes == GROUPED.block_size_bytes()
    shared = allocator.share_block(gpu)
    assert shared.ref_count == 2
    assert allocator.free_block(shared).ref_count == 1
    assert allocator.free_block(gpu).is_free
    check_free(allocator, BLOCKS, HOST_BLOCKS - 1)


def test_as_many_host_blocks_as_device_blocks_unless_told_otherwise() -> None:
    check_free(KVCacheAllocator(CONFIG), BLOCKS, BLOCKS)


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (OutOfBlocksError, lambda a, b: a.allocate_gpu_blocks(BLOCKS), "for 13 blocks, want at most the 12 free"),
        (OutOfBlocksError, lambda a, b: a.allocate_cpu_blocks(HOST_BLOCKS), "5 free"),
        (OutOfBlocksError, lambda a, b: a.allocate_gpu_blocks(13, strategy=CONTIGUOUS), r"at most 12, .* 12 free"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_blocks(1, strategy=PREDICTIVE), "PredictiveBlockAllocator"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_blocks(1, strategy=NUMA_AWARE, node=1), "got .1., want 0"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_blocks(1, node=0), "got 0 with 'scattered'"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_blocks(-1), "got -1"),
        (InvalidArgumentError, lambda a, b: a.allocate_cpu_blocks(1.5), "1.5"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_block(3), "want 0 to 2"),
        (InvalidArgumentError, lambda a, b: a.allocate_gpu_block(-1), "got -1"),
        (DoubleFreeError, lambda a, b: a.free_block(b[0].free()), "no reference"),
        (DoubleFreeError, lambda a, b: a.free_blocks([b[0], b[1], b[0]]), "blocks of the device: got"),
        (DoubleFreeError, lambda a, b: a.free_blocks([b[0], b[1], b[1]]), "blocks of the host: got"),
        (DoubleFreeError, lambda a, b: a.free_block(dataclasses.replace(b[0], block_id=12)), r"got \[12\]"),
        (InvalidBlockError, lambda a, b: a.free_block(dataclasses.replace(b[0], block_id=13)), "want 0 to 12"),
        (InvalidBlockError, lambda a, b: a.share_block(b[0].free()), "want a block in use"),
        (InvalidBlockError, lambda a, b: a.share_block(dataclasses.replace(b[1], block_id=4)), r"host: got \[4\]"),
        (ConfigError, lambda a, b: KVCacheAllocator(CONFIG, 0), "got 0"),
    ],
)
def test_bad_input_raises_and_changes_nothing(error: type[Exception], call: object, wanted: str) -> None:
    allocator = KVCacheAllocator(CONFIG, HOST_BLOCKS)
    blocks = [allocator.allocate_gpu_block(), allocator.allocate_cpu_block()]
    with pytest.raises(error, match=wanted):
        call(allocator, blocks)
    check_free(allocator, BLOCKS - 1, HOST_BLOCKS - 1)
    allocator.free_blocks(blocks)
    check_free(allocator, BLOCKS, HOST_BLOCKS)


def test_threads_never_get_the_same_block() -> None:
    allocator = KVCacheAllocator(CONFIG)
    clashes, held, guard = [], set(), threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            blocks = allocator.allocate_gpu_blocks(int(rng.integers(1, 4)))
            ids = {block.block_id for block in blocks}
            with guard:
                clashes.extend(ids & held)
                held.update(ids)
            with guard:
                held.difference_update(ids)
            allocator.free_blocks(blocks)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    check_free(allocator, BLOCKS, BLOCKS)


def test_a_strategy_is_chosen_call_by_call() -> None:
    """Host blocks 0 to 2 are on node 0, 3 to 5 on node 1."""
    allocator = KVCacheAllocator(CONFIG, HOST_BLOCKS, num_host_nodes=2)

    def ids(n: int, **how) -> list[int]:
        return [block.block_id for block in allocator.allocate_cpu_blocks(n, **how)]

    near = allocator.allocate_cpu_blocks(2, strategy=NUMA_AWARE, node=1)
    assert [block.block_id for block in near] == [3, 4]
    allocator.free_block(near[1])
    assert ids(1, strategy=CONTIGUOUS) == [4]  # of 0 to 2 and 4 to 5 the shorter run
    with pytest.raises(
        OutOfBlocksError, match="for 4 consecutive blocks, want at most 3, the longest run of the 4 free"
    ):
        ids(4, strategy=CONTIGUOUS)
    assert ids(2, strategy=CONTIGUOUS) == [0, 1]
    assert ids(2) == [2, 5]
    check_free(allocator, BLOCKS, 0)
    with pytest.raises(ConfigError, match="got 4, want a positive integer that divides 6"):
        KVCacheAllocator(CONFIG, HOST_BLOCKS, num_host_nodes=4)
