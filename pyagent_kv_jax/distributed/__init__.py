"""Between floors 3 and 4: caches, tables and batches over the devices of a mesh."""

from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy, all_reduce_states
from pyagent_kv_jax.distributed.batch import (
    BatchDCPDecodeWrapper,
    BatchDCPPrefillWrapper,
    BatchExecutor,
    BatchMetadata,
    BatchPhase,
    BatchRequest,
    DCPPlanConfig,
    ExecutionPlan,
    UnifiedBatchWrapper,
    create_decode_wrapper,
    create_prefill_wrapper,
    create_unified_wrapper,
)
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.combine import Combine
from pyagent_kv_jax.distributed.owned import DistributedBlockTable, OwnedKVPages
from pyagent_kv_jax.distributed.replicas import check_replicas
from pyagent_kv_jax.distributed.ring import (
    ring_attention,
    ring_attention_on_rank,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages, sharded_cache

__all__ = [
    "AllReduceStrategy",
    "BatchDCPDecodeWrapper",
    "BatchDCPPrefillWrapper",
    "BatchExecutor",
    "BatchMetadata",
    "BatchPhase",
    "BatchRequest",
    "CacheSharding",
    "Combine",
    "DCPPlanConfig",
    "DistributedBlockTable",
    "ExecutionPlan",
    "OwnedKVPages",
    "ShardedKVPages",
    "UnifiedBatchWrapper",
    "all_reduce_states",
    "check_replicas",
    "create_decode_wrapper",
    "create_prefill_wrapper",
    "create_unified_wrapper",
    "ring_attention",
    "ring_attention_on_rank",
    "sharded_cache",
    "zigzag_positions",
    "zigzag_shard",
    "zigzag_unshard",
]
