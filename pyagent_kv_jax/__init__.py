"""A paged KV cache for JAX: block tables, block pools and caches as pytrees.

Which tier do I want?

- functions: ``pallas_kernels`` (plain arrays), ``pyagent_kv_jax.tables``, ``pyagent_kv_jax.pool``
- one pytree inside your own ``jit``: ``PagedKVCache``
- request ids, callbacks, a scheduler step in one call: ``KVCacheManager``
- prompts in, tokens out: ``pyagent_kv_jax.serving.generate``
"""

from pallas_kernels import checking
from pyagent_kv_jax.cache import AttentionMetadata, KVPages, LayerCache, PagedKVCache
from pyagent_kv_jax.config import BlockTableConfig, DeviceType, DType, KVCacheConfig, free_memory_bytes
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
    TooManyRequestsError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager import KVCacheManager, MemoryPressure, StepPlan, create_kv_cache_manager
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable, SlotMapping

__all__ = [
    "AttentionMetadata",
    "BlockPool",
    "BlockTable",
    "BlockTableConfig",
    "CallbackError",
    "ConfigError",
    "DType",
    "DeviceType",
    "DeviceUnavailableError",
    "DoubleFreeError",
    "DuplicateRequestError",
    "InvalidArgumentError",
    "InvalidBlockError",
    "KVCacheConfig",
    "KVCacheError",
    "KVCacheManager",
    "KVPages",
    "LayerCache",
    "MemoryPressure",
    "ModelLoadError",
    "OutOfBlocksError",
    "PagedKVCache",
    "RequestTooLongError",
    "ShapeMismatchError",
    "SlotMapping",
    "StepPlan",
    "TooManyRequestsError",
    "UnknownRequestError",
    "checking",
    "create_kv_cache_manager",
    "free_memory_bytes",
]
