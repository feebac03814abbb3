"""Batches of requests over a cache on a mesh: planned on the host, run in one compiled call a layer."""

from pyagent_kv_jax.distributed.batch.batch_executor import BatchExecutor, MeshBatchExecutor
from pyagent_kv_jax.distributed.batch.batch_metadata import BatchMetadata
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase, BatchRequest
from pyagent_kv_jax.distributed.batch.batch_sizes import split_requests
from pyagent_kv_jax.distributed.batch.batch_stats import BatchStats
from pyagent_kv_jax.distributed.batch.communication import Collective, collectives_of
from pyagent_kv_jax.distributed.batch.decode_wrapper import BatchDCPDecodeWrapper
from pyagent_kv_jax.distributed.batch.execution_plan import ExecutionPlan, make_plan
from pyagent_kv_jax.distributed.batch.factories import (
    create_decode_wrapper,
    create_prefill_wrapper,
    create_unified_wrapper,
)
from pyagent_kv_jax.distributed.batch.memory import step_bytes
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.batch.planned_attention import BatchOutput, attend_planned
from pyagent_kv_jax.distributed.batch.prefill_wrapper import BatchDCPPrefillWrapper, ReadyBlocks
from pyagent_kv_jax.distributed.batch.unified_wrapper import UnifiedBatchWrapper

__all__ = [
    "BatchDCPDecodeWrapper",
    "BatchDCPPrefillWrapper",
    "BatchExecutor",
    "BatchMetadata",
    "BatchOutput",
    "BatchPhase",
    "BatchRequest",
    "BatchStats",
    "Collective",
    "DCPPlanConfig",
    "ExecutionPlan",
    "MeshBatchExecutor",
    "ReadyBlocks",
    "UnifiedBatchWrapper",
    "attend_planned",
    "collectives_of",
    "create_decode_wrapper",
    "create_prefill_wrapper",
    "create_unified_wrapper",
    "make_plan",
    "split_requests",
    "step_bytes",
]
