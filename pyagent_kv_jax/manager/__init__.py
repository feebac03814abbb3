"""Floor 4: request ids, callbacks and locks around the pytrees below."""

from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager, create_kv_cache_manager
from pyagent_kv_jax.manager.step_plan import MemoryPressure, StepPlan

__all__ = ["KVCacheManager", "MemoryPressure", "StepPlan", "create_kv_cache_manager"]
