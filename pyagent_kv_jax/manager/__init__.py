"""Floor 4: request ids, callbacks and locks around the pytrees below."""

from pyagent_kv_jax.manager.block_size_adaptation import BlockSizeChooser
from pyagent_kv_jax.manager.block_size_switch import BlockSizeReport
from pyagent_kv_jax.manager.block_table_factory import BlockTableFactory
from pyagent_kv_jax.manager.block_table_v2 import BlockTableStats, BlockTableV2
from pyagent_kv_jax.manager.creation import create_kv_cache_manager
from pyagent_kv_jax.manager.defragmentation import DefragmentationReport
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.manager.manager_snapshot import ManagerSnapshot
from pyagent_kv_jax.manager.manager_stats import ManagerStats
from pyagent_kv_jax.manager.memory_pressure import MemoryPressure
from pyagent_kv_jax.manager.options import ManagerOptions, PreemptionCost
from pyagent_kv_jax.manager.predictive_block_allocator import PredictiveBlockAllocator
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, BlockKeys, CacheExtras, MultimodalItem
from pyagent_kv_jax.manager.prefix.chain_places import CachedBlocks
from pyagent_kv_jax.manager.prefix.events import AllBlocksCleared, BlockRemoved, BlocksSwapped, BlockStored, EventLog
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit
from pyagent_kv_jax.manager.step_plan import StepPlan

__all__ = [
    "AllBlocksCleared",
    "BlockHasher",
    "BlockKeys",
    "BlockRemoved",
    "BlockSizeChooser",
    "BlockSizeReport",
    "BlockStored",
    "BlockTableFactory",
    "BlockTableStats",
    "BlockTableV2",
    "BlocksSwapped",
    "CacheExtras",
    "CachedBlocks",
    "DefragmentationReport",
    "EventLog",
    "KVCacheManager",
    "ManagerOptions",
    "ManagerSnapshot",
    "ManagerStats",
    "MemoryPressure",
    "MultimodalItem",
    "PredictiveBlockAllocator",
    "PreemptionCost",
    "PrefixHit",
    "StepPlan",
    "create_kv_cache_manager",
]
