"""Compile for TPUs that are not there, and read what the compiler says about memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a cloud server where it is, and waits
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody has a TPU here, so any number may load it

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.paged_attention.shapes import AttentionShape

POOL_BYTES = 2**30  # of K, and again of V
# What a program may hold beside the pools: activations, staged pages, the LSE in every lane. Far below a pool.
ALLOWANCE = 2**27
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def device(tpu: str) -> Any:
    """One device of a TPU that is not there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[tpu]).devices[0]


def compile_for(tpu: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """``function`` compiled for ``tpu``; ``arguments`` are trees of ``ShapeDtypeStruct``."""
    target = device(tpu)
    abstract = AbstractDevice(device_kind=target.device_kind, num_cores=target.num_cores, platform="tpu")
    sharding = SingleDeviceSharding(target)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        lowered = jax.jit(function, donate_argnums=donate).trace(*placed).lower(lowering_platforms=("tpu",))
    return lowered.compile()


array = jax.ShapeDtypeStruct


def i32(*shape: int) -> Any:
    return array(shape, jnp.int32)


def f32(*shape: int) -> Any:
    return array(shape, jnp.float32)


def pool(shape: AttentionShape, dtype: Any = jnp.bfloat16, block_size: int = 16) -> tuple[Any, Any]:
    """K and V pages of POOL_BYTES each, head_dim padded to whole lanes."""
    width = -(-shape.head_dim // 128) * 128
    page = shape.kv_heads * block_size * width * jnp.dtype(dtype).itemsize
    pages = array((POOL_BYTES // page, shape.kv_heads, block_size, width), dtype)
    return pages, pages


def assert_in_place(compiled: Any, pools: Any) -> None:
    """The pools are updated where they are, and nothing like them is held beside."""
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in pools)
    assert memory.temp_size_in_bytes < ALLOWANCE


def assert_no_copy(compiled: Any) -> None:
    """Nothing like a pool is held beside what is given."""
    assert compiled.memory_analysis().temp_size_in_bytes < ALLOWANCE
