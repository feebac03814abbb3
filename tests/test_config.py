"""Sizes, kinds and their errors; no arrays."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import (
    BlockTableConfig,
    ConfigError,
    DeviceType,
    DeviceUnavailableError,
    DType,
    KVCacheConfig,
    free_memory_bytes,
)

LLAMA_3_8B = KVCacheConfig(num_layers=32, num_heads=8, head_dim=128, num_blocks=100, dtype=DType.BFLOAT16)


def test_bytes_of_a_real_model() -> None:
    assert LLAMA_3_8B.kv_size_per_token() == 131_072  # 128 KiB a token, as the Llama-3 papers count it
    assert LLAMA_3_8B.block_size_bytes() == 2 * 1024 * 1024
    fp8 = dataclasses.replace(LLAMA_3_8B, dtype=DType.FP8)
    assert fp8.kv_size_per_token() == 65_536


def test_v_heads_may_have_another_size() -> None:
    config = KVCacheConfig(num_layers=1, num_heads=1, head_dim=192, v_head_dim=128, num_blocks=1, dtype=DType.FLOAT32)
    assert config.kv_size_per_token() == (192 + 128) * 4


def test_tpu_storage_is_padded_and_counted() -> None:
    config = KVCacheConfig(num_layers=1, num_heads=1, head_dim=64, num_blocks=1, device=DeviceType.TPU)
    assert config.dtype is DType.BFLOAT16
    assert config.storage_head_dim(64) == 128
    assert config.kv_size_per_token() == 2 * 128 * 2


def test_the_pool_is_sized_from_free_memory() -> None:
    device = DeviceType.CPU.devices()[0]
    before = free_memory_bytes(device)
    config = KVCacheConfig(num_layers=32, num_heads=8, head_dim=128, device=DeviceType.CPU, memory_fraction=0.5)
    after = free_memory_bytes(device)
    low, high = sorted((before, after))
    assert 0.5 * 0.5 * low <= config.pool_blocks * config.block_size_bytes() <= 0.5 * 2 * high


def test_storage_keeps_scatters_in_place() -> None:
    assert DType.FP8.storage_dtype(DeviceType.CUDA) == jnp.uint8
    assert DType.BFLOAT16.storage_dtype(DeviceType.CPU) == jnp.uint16
    assert DType.BFLOAT16.storage_dtype(DeviceType.CUDA) == jnp.bfloat16
    assert DType.FLOAT32.storage_dtype(DeviceType.CPU) == jnp.float32


def test_table_config_covers_the_longest_request() -> None:
    config = dataclasses.replace(LLAMA_3_8B, max_model_len=100, block_size=16).table_config()
    assert config.max_num_blocks_per_req == 7
    assert config.max_tokens_per_req == 112


def test_hybrid_block_sizes() -> None:
    config = BlockTableConfig(block_size=64, kernel_block_size=16, max_num_reqs=2, max_num_blocks_per_req=3)
    assert config.blocks_per_kv_block == 4


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"head_dim": 12.5}, "head_dim: got 12.5"),
        ({"block_size": True}, "block_size: got True"),
        ({"num_blocks": -1}, "num_blocks: got -1"),
        ({"memory_fraction": 1.5}, "memory_fraction: got 1.5"),
        ({"num_blocks": 2**27}, "slots, want at most 2147483647"),
    ],
)
def test_sizes_that_cannot_work(change: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        dataclasses.replace(LLAMA_3_8B, **change)


@pytest.mark.parametrize("name", ["kernel_block_size", "cp_kv_cache_interleave_size"])
def test_sizes_that_do_not_divide(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got 5, want a divisor of block_size 16"):
        BlockTableConfig(block_size=16, max_num_reqs=1, max_num_blocks_per_req=1, **{name: 5})


def test_mps_is_refused_by_name() -> None:
    with pytest.raises(DeviceUnavailableError, match="'mps' is not supported: want one of 'cpu', 'cuda', 'tpu'"):
        KVCacheConfig(num_layers=1, num_heads=1, head_dim=8, num_blocks=1, device=DeviceType.MPS)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(DeviceUnavailableError, match="JAX_PLATFORMS='cpu'"):
        DeviceType.TPU.devices()


def test_dtypes_are_known_by_jaxs_names_and_others_are_refused():
    assert DType(jnp.bfloat16) is DType("bfloat16") is DType.BFLOAT16
    assert DType(jnp.float8_e4m3fn) is DType("float8_e4m3fn") is DType.FP8
    assert dataclasses.replace(LLAMA_3_8B, dtype=np.dtype("int8")).dtype is DType.INT8
    for wrong in ("float17", jnp.float64, 3):
        with pytest.raises(ConfigError, match=r"want one of .*'bfloat16'"):
            dataclasses.replace(LLAMA_3_8B, dtype=wrong)
