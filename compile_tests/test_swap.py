"""Swapping, compiled for Hopper and TPU v5e: the target changes in place, and the host's blocks are in host memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from compile_tests import nvidia, tpu
from pyagent_kv_jax.cache import host_pages

LAYERS, BLOCKS, HOST_BLOCKS, SWAPPED = 32, 512, 768, 64
TILE = (8, 16, 128)  # of Llama-3-8B: K of a block in one layer
BLOCK_ELEMENTS = 2 * LAYERS * 8 * 16 * 128


def compiled(target: str, direction: str, dtype: Any) -> Any:
    """The program that ``swap_out`` or ``swap_in`` dispatches; "within": that of a change of block size in the host.

    The pages' shardings are over an abstract mesh, which keeps the kind of memory; over a device that is not there jax
    drops it. The ids, on that device, say what to compile for.
    """
    device, platform = device_of(target)
    mesh = AbstractMesh((1,), ("x",), abstract_device=platform)

    def arrays(memory: str, *shape: int) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=memory)
        return (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),) * 2

    ids = jax.ShapeDtypeStruct((SWAPPED,), jnp.int32, sharding=SingleDeviceSharding(device))
    pages = arrays("device", LAYERS * BLOCKS, *TILE)
    host = arrays(host_pages.HOST_MEMORY, HOST_BLOCKS, LAYERS, *TILE)
    lowering = {"lowering_platforms": ("tpu" if target in tpu.TPUS else "cuda",)}
    if direction == "within":
        return host_pages._copy_within.trace(host, ids, ids).lower(**lowering).compile()
    copy, source, into = {
        "out": (host_pages._copy_out, pages, host),
        "in": (host_pages._copy_in, host, pages),
    }[direction]
    traced = host_pages._DISPATCHED[copy].trace(source, into, ids, ids)
    return traced.lower(**lowering).compile()


def device_of(target: str) -> tuple[Any, AbstractDevice]:
    if target in tpu.TPUS:
        device = tpu.device(target)
        return device, AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    (device,), gpu = nvidia.sharding(target).device_set, nvidia.GPUS[target]
    return device, AbstractDevice(device_kind=gpu.kind, num_cores=gpu.cores, platform="gpu")


@pytest.mark.parametrize("target", ["sm_90", "v5e"])
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float32])
def test_in_place_and_on_the_host(dtype: Any, direction: str, target: str) -> None:
    program = compiled(target, direction, dtype)
    memory, block = program.memory_analysis(), BLOCK_ELEMENTS * jnp.dtype(dtype).itemsize
    pages, host, slack = BLOCKS * block, HOST_BLOCKS * block, 2**20
    # What is read and what is written lies where it should: on the device the pages, on the host its blocks.
    assert memory.host_argument_size_in_bytes == host
    assert pages <= memory.argument_size_in_bytes < pages + slack
    shape = f"{HOST_BLOCKS},{LAYERS},8,16,128"
    layout = program.as_text().splitlines()[0].split("entry_computation_layout=")[1]
    in_entry = [piece.split("}")[0] for piece in layout.split(shape)[1:]]
    assert len(in_entry) == (4 if direction == "out" else 2)
    assert all("S(5)" in piece for piece in in_entry)
    # Only the target comes out, and it is the memory that went in.
    if direction == "out":
        assert memory.host_alias_size_in_bytes == memory.host_output_size_in_bytes == host
        assert memory.output_size_in_bytes < slack
    else:
        assert memory.alias_size_in_bytes == pages
        assert memory.host_output_size_in_bytes == 0
    # In between there is one block, not the blocks that move and no pool.
    assert memory.temp_size_in_bytes < 2 * block + slack
    assert memory.host_temp_size_in_bytes == 0


@pytest.mark.parametrize("target", ["sm_90", "v5e"])
def test_pages_move_within_the_host_pool_in_place(target: str) -> None:
    memory, page = compiled(target, "within", jnp.bfloat16).memory_analysis(), BLOCK_ELEMENTS * 2
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes == HOST_BLOCKS * page
    assert memory.temp_size_in_bytes < (SWAPPED + 2) * page + 2**20  # what moves is read before anything is written
    assert memory.host_temp_size_in_bytes == 0
