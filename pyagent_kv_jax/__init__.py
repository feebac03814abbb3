"""A paged KV cache for JAX: block tables, block pools and caches as pytrees.

Which tier do I want?

- functions: ``pallas_kernels`` (plain arrays), ``pyagent_kv_jax.tables``, ``pyagent_kv_jax.pool``
- one pytree inside your own ``jit``: ``PagedKVCache``
- request ids, callbacks, a scheduler step in one call: ``KVCacheManager``
- prompts in, tokens out: ``pyagent_kv_jax.serving.generate``
"""

from pallas_kernels import checking
from pyagent_kv_jax.cache import (
    AttentionMetadata,
    BlockInfo,
    KVCacheAllocator,
    KVCacheBlock,
    KVCacheBlocks,
    KVCacheTransfer,
    KVPages,
    LayerCache,
    PagedKVCache,
)
from pyagent_kv_jax.config import (
    BlockAllocationStrategy,
    BlockTableConfig,
    DeviceType,
    DType,
    KVCacheConfig,
    LayerGroup,
    free_memory_bytes,
    group_layers,
)
from pyagent_kv_jax.errors import (
    CallbackError,
    ConfigError,
    DeviceUnavailableError,
    DoubleFreeError,
    DuplicateRequestError,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheError,
    ModelLoadError,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    TableFullError,
    TooManyRequestsError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager import (
    BlockTableFactory,
    BlockTableStats,
    BlockTableV2,
    CacheExtras,
    DefragmentationReport,
    KVCacheManager,
    ManagerOptions,
    ManagerStats,
    MemoryPressure,
    MultimodalItem,
    PredictiveBlockAllocator,
    PreemptionCost,
    StepPlan,
    create_kv_cache_manager,
)
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable, CompressedSlotMapping, CpuGpuBuffer, SlotMapping, SparseBlockTable

__all__ = [
    "AttentionMetadata",
    "BlockAllocationStrategy",
    "BlockInfo",
    "BlockPool",
    "BlockTable",
    "BlockTableConfig",
    "BlockTableFactory",
    "BlockTableStats",
    "BlockTableV2",
    "CacheExtras",
    "CallbackError",
    "CompressedSlotMapping",
    "ConfigError",
    "CpuGpuBuffer",
    "DType",
    "DefragmentationReport",
    "DeviceType",
    "DeviceUnavailableError",
    "DoubleFreeError",
    "DuplicateRequestError",
    "InvalidArgumentError",
    "InvalidBlockError",
    "KVCacheAllocator",
    "KVCacheBlock",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVCacheError",
    "KVCacheManager",
    "KVCacheTransfer",
    "KVPages",
    "LayerCache",
    "LayerGroup",
    "ManagerOptions",
    "ManagerStats",
    "MemoryPressure",
    "ModelLoadError",
    "MultimodalItem",
    "OutOfBlocksError",
    "PagedKVCache",
    "PredictiveBlockAllocator",
    "PreemptionCost",
    "RequestTooLongError",
    "ShapeMismatchError",
    "SlotMapping",
    "SparseBlockTable",
    "StepPlan",
    "TableFullError",
    "TooManyRequestsError",
    "UnknownRequestError",
    "checking",
    "create_kv_cache_manager",
    "free_memory_bytes",
    "group_layers",
]
