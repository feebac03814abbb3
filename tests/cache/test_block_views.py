"""Views of blocks: what each transition gives, and that the impossible ones raise and change nothing."""

from __future__ import annotations

import dataclasses

import pytest

from pyagent_kv_jax import DeviceType, DoubleFreeError, DType, InvalidArgumentError, InvalidBlockError
from pyagent_kv_jax.cache.block_views import BlockInfo, KVCacheBlock, KVCacheBlocks


def test_block_info_counts() -> None:
    info = BlockInfo(block_id=3)
    assert info.device is DeviceType.default()
    assert info.can_free()
    twice = info.increment_ref().increment_ref()
    assert (twice.block_id, twice.ref_count, twice.can_free()) == (3, 2, False)
    assert not twice.decrement_ref().can_free()
    assert twice.decrement_ref().decrement_ref() == info
    assert twice.ref_count == 2  # a value


def test_a_block_from_free_to_free() -> None:
    free = KVCacheBlock(5, device=DeviceType.CUDA, on_host=True, group=1)
    assert free.is_free
    assert free.nbytes == 0
    taken = free.allocate(num_heads=2, head_dim=16, block_size=4, dtype=DType.BFLOAT16, num_layers=3, v_head_dim=8)
    assert (taken.ref_count, taken.is_free) == (1, False)
    assert taken.k_shape == (3, 2, 4, 16)
    assert taken.v_shape == (3, 2, 4, 8)
    assert taken.nbytes == 3 * 2 * 4 * (16 + 8) * 2
    assert (taken.block_id, taken.device, taken.on_host, taken.group) == (5, DeviceType.CUDA, True, 1)
    shared = taken.acquire()
    assert shared.ref_count == 2
    assert shared.release() == taken
    assert taken.free() == taken.release() == free
    assert free.allocate(2, 16, 4, "fp8").nbytes == 2 * 2 * 4 * 16


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (DoubleFreeError, lambda b: b.free(), "block 5"),
        (DoubleFreeError, lambda b: b.release(), "no reference"),
        (InvalidBlockError, lambda b: b.acquire(), "want a block in use"),
        (
            InvalidBlockError,
            lambda b: b.allocate(1, 8, 4, DType.INT8).allocate(1, 8, 4, DType.INT8),
            "want a free block",
        ),
        (InvalidBlockError, lambda b: b.allocate(1, 8, 4, DType.INT8).acquire().free(), "got 2 references"),
        (InvalidArgumentError, lambda b: b.allocate(0, 8, 4, DType.INT8), "num_heads: got 0"),
        (InvalidArgumentError, lambda b: b.allocate(1, 8.0, 4, DType.INT8), "head_dim"),
        (InvalidArgumentError, lambda b: b.allocate(1, 8, 4, DType.INT8, num_layers=-1), "num_layers"),
        (InvalidArgumentError, lambda b: KVCacheBlock(-1), "block_id: got -1"),
        (InvalidArgumentError, lambda b: KVCacheBlock(1, group=0.5), "group"),
        (DoubleFreeError, lambda b: BlockInfo(4).decrement_ref(), "block 4"),
        (InvalidArgumentError, lambda b: BlockInfo(4, ref_count=-1), "ref_count: got -1"),
        (InvalidBlockError, lambda b: KVCacheBlocks().append_gpu(3).append_gpu(3), r"gpu_block_ids: got \[3\]"),
        (InvalidBlockError, lambda b: KVCacheBlocks(cpu_block_ids=(1, 2, 1)), r"cpu_block_ids: got \[1\]"),
        (InvalidArgumentError, lambda b: KVCacheBlocks().append_cpu(-1), "got -1"),
        (InvalidArgumentError, lambda b: KVCacheBlocks().append_gpu("a"), "'a'"),
        (dataclasses.FrozenInstanceError, lambda b: setattr(b, "ref_count", 3), "ref_count"),
    ],
)
def test_impossible_transitions_raise(error: type[Exception], call: object, wanted: str) -> None:
    block = KVCacheBlock(5)
    with pytest.raises(error, match=wanted):
        call(block)
    assert block == KVCacheBlock(5)


def test_a_requests_blocks() -> None:
    empty = KVCacheBlocks()
    blocks = empty.append_gpu(4).append_gpu(2).append_cpu(2)
    assert blocks.gpu_block_ids == (4, 2)
    assert blocks.cpu_block_ids == (2,)
    assert blocks.num_blocks() == 3
    assert empty.num_blocks() == 0
    assert KVCacheBlocks([1, 0], [7]) == KVCacheBlocks((1, 0), (7,))
