"""The names the project was asked for, letter by letter: classes, methods and parameters.

Where the seed's constructor took a config, ours is ``create(config)`` for pytrees. Names that no floor has yet are
added here with the floor that brings them.
"""

from __future__ import annotations

import inspect

import pytest

import pyagent_kv_jax

METHODS = {
    "BlockTable": {
        "create": ["config"],
        "append_row": ["row_idx", "block_ids", "num_tokens"],
        "get_row": ["row_idx"],
        "clear_row": ["row_idx"],
        "compute_slot_mapping": ["row_idx", "num_tokens", "start_position"],
        "update_slot_mapping": ["token_positions"],
        "get_num_blocks": ["row_idx"],
        "get_total_blocks": [],
    },
    "SparseBlockTable": {
        "create": ["config"],
        "set_block": ["row_idx", "position", "block_id"],
        "get_block": ["row_idx", "position"],
        "get_slot": ["row_idx", "position"],
        "clear_row": ["row_idx"],
        "to_dense": ["row_idx", "max_blocks"],
    },
    "PredictiveBlockAllocator": {
        "__init__": ["total_blocks", "block_size", "prediction_horizon"],
        "allocate": ["request_id", "num_blocks", "predict_future"],
        "free": ["block_ids"],
        "_predict_future_need": ["request_id"],
        "get_num_free": [],
    },
    "BlockTableV2": {
        "__init__": ["config", "use_sparse", "use_prediction"],
        "append_row": ["row_idx", "block_ids", "num_tokens"],
        "get_row": ["row_idx"],
        "clear_row": ["row_idx"],
        "compute_slot_mapping": ["row_idx", "num_tokens", "start_position"],
        "allocate_for_request": ["request_id", "row_idx", "num_blocks"],
        "get_stats": [],
    },
    "BlockTableFactory": {
        "create_standard": ["block_size", "max_num_reqs", "max_blocks_per_req"],
        "create_sparse": ["block_size"],
        "create_v2": ["block_size", "use_sparse", "use_prediction"],
    },
    "DistributedBlockTable": {
        "create": ["config", "num_workers", "worker_id"],
        "allocate_blocks": ["row_idx", "num_blocks", "prefer_local"],
        "get_block_location": ["block_id"],
        "is_local": ["block_id"],
    },
    "BatchMetadata": {"is_prefill": [], "is_decode": []},
    "BatchExecutor": {"plan": ["requests"], "run": ["plan"]},
    "BatchDCPPrefillWrapper": {"plan": ["requests"], "run": ["plan"], "process_batch": ["requests"], "get_stats": []},
    "BatchDCPDecodeWrapper": {"plan": ["requests"], "run": ["plan"], "process_batch": ["requests"], "get_stats": []},
    "UnifiedBatchWrapper": {"process_batch": ["requests"], "get_stats": []},
    "BlockInfo": {"increment_ref": [], "decrement_ref": [], "can_free": []},
    "CpuGpuBuffer": {
        "__init__": ["shape", "dtype"],
        "get_cpu": [],
        "get_gpu": [],
        "set": ["row", "col", "value"],
        "get": ["row", "col"],
        "_sync_to_gpu": [],
        "set_row": ["row", "values"],
    },
    "KVCacheBlock": {
        "allocate": ["num_heads", "head_dim", "block_size", "dtype"],
        "free": [],
        "acquire": [],
        "release": [],
    },
    "KVCacheBlocks": {"num_blocks": [], "append_gpu": ["block_id"], "append_cpu": ["block_id"]},
    "KVCacheAllocator": {
        "__init__": ["config"],
        "_init_pools": [],
        "allocate_gpu_block": ["layer_idx"],
        "allocate_cpu_block": ["layer_idx"],
        "free_block": ["block"],
        "get_num_free_gpu_blocks": [],
        "get_num_free_cpu_blocks": [],
        "usage": [],
    },
    "KVCacheTransfer": {
        "__init__": ["config"],
        "swap_out": ["gpu_block", "cpu_block"],
        "swap_in": ["cpu_block", "gpu_block"],
        "copy_blocks": ["src_blocks", "dst_blocks"],
    },
    "KVCacheConfig": {"kv_size_per_token": [], "block_size_bytes": []},
    "PagedKVCache": {
        "create": ["config"],
        "allocate_for_request": ["request_id", "num_tokens"],
        "extend_allocation": ["request_id", "additional_tokens"],
        "free_request": ["request_id"],
        "get_block_table": ["request_id", "layer_idx"],
        "usage": [],
        "get_num_free_blocks": [],
    },
    "KVCacheManager": {
        "__init__": ["config"],
        "allocate": ["request_id", "num_tokens"],
        "extend": ["request_id", "additional_tokens"],
        "free": ["request_id"],
        "get_block_table": ["request_id", "layer_idx"],
        "usage": [],
        "get_num_free_blocks": [],
        "can_allocate": ["num_tokens"],
        "on_memory_pressure": ["callback"],
        "_trigger_memory_pressure": [],
    },
}
FIELDS = {
    "BlockTableConfig": [
        "block_size",
        "kernel_block_size",
        "max_num_reqs",
        "max_num_blocks_per_req",
        "max_num_batched_tokens",
        "cp_kv_cache_interleave_size",
    ],
    "BatchRequest": ["request_id"],
    "DCPPlanConfig": [],
    "ExecutionPlan": [],
    "KVCacheConfig": ["num_layers", "num_heads", "head_dim", "num_blocks", "block_size", "dtype", "device"],
}
MEMBERS = {
    "BlockAllocationStrategy": {
        "CONTIGUOUS": "contiguous",
        "SCATTERED": "scattered",
        "NUMA_AWARE": "numa_aware",
        "PREDICTIVE": "predictive",
    },
    "AllReduceStrategy": {"NCCL": "nccl", "RING": "ring", "TREE": "tree", "RECURSIVE": "recursive"},
    "BatchPhase": {"PREFILL": "prefill", "DECODE": "decode", "MIXED": "mixed"},
    "DeviceType": {"CPU": "cpu", "CUDA": "cuda", "TPU": "tpu", "MPS": "mps"},
    "DType": {"FLOAT16": "float16", "BFLOAT16": "bfloat16", "FLOAT32": "float32", "INT8": "int8", "FP8": "fp8"},
}
FUNCTIONS = {
    "create_kv_cache_manager": ["num_layers", "num_heads", "head_dim", "num_blocks", "block_size"],
    "create_prefill_wrapper": [],
    "create_decode_wrapper": [],
    "create_unified_wrapper": [],
}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in METHODS for method in METHODS[name]])
def test_methods_and_their_parameters(name: str, method: str) -> None:
    found = inspect.getattr_static(getattr(pyagent_kv_jax, name), method)
    if isinstance(found, property):
        found = found.fget
    parameters = list(inspect.signature(getattr(found, "__func__", found)).parameters)
    wanted = METHODS[name][method]
    assert [p for p in parameters if p in wanted] == wanted


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    assert set(FIELDS[name]) <= set(inspect.signature(getattr(pyagent_kv_jax, name)).parameters)


@pytest.mark.parametrize("name", MEMBERS)
def test_members_are_strings(name: str) -> None:
    kind = getattr(pyagent_kv_jax, name)
    assert {member.name: member.value for member in kind} == MEMBERS[name]
    assert all(isinstance(member, str) for member in kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    parameters = list(inspect.signature(getattr(pyagent_kv_jax, name)).parameters)
    assert parameters[: len(FUNCTIONS[name])] == FUNCTIONS[name]


def test_everything_public_is_exported() -> None:
    assert sorted(pyagent_kv_jax.__all__, key=str.lower) == sorted(set(pyagent_kv_jax.__all__), key=str.lower)
    for name in pyagent_kv_jax.__all__:
        assert getattr(pyagent_kv_jax, name).__doc__
