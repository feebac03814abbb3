"""The one-line ways in."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.batch.decode_wrapper import BatchDCPDecodeWrapper
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.batch.prefill_wrapper import BatchDCPPrefillWrapper
from pyagent_kv_jax.distributed.batch.unified_wrapper import UnifiedBatchWrapper


def create_prefill_wrapper(
    cache: KVCacheConfig, mesh: Mesh, num_q_heads: int, **options: Any
) -> BatchDCPPrefillWrapper:
    """For prompts. Arguments and errors as ``DCPPlanConfig.create``."""
    return BatchDCPPrefillWrapper(DCPPlanConfig.create(cache, mesh, num_q_heads, **options))


def create_decode_wrapper(cache: KVCacheConfig, mesh: Mesh, num_q_heads: int, **options: Any) -> BatchDCPDecodeWrapper:
    """For decode. Arguments and errors as ``DCPPlanConfig.create``."""
    return BatchDCPDecodeWrapper(DCPPlanConfig.create(cache, mesh, num_q_heads, **options))


def create_unified_wrapper(cache: KVCacheConfig, mesh: Mesh, num_q_heads: int, **options: Any) -> UnifiedBatchWrapper:
    """For mixed batches of any size. Arguments and errors as ``DCPPlanConfig.create``."""
    return UnifiedBatchWrapper(DCPPlanConfig.create(cache, mesh, num_q_heads, **options))
