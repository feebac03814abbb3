"""Floor 3: the pages, and pool, table and pages moving together."""

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata, LayerCache
from pyagent_kv_jax.cache.block_views import BlockInfo, KVCacheBlock, KVCacheBlocks
from pyagent_kv_jax.cache.host_pages import HostPages, swap_in, swap_out
from pyagent_kv_jax.cache.kv_cache_allocator import KVCacheAllocator
from pyagent_kv_jax.cache.kv_cache_transfer import KVCacheTransfer
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache

__all__ = [
    "AttentionMetadata",
    "BlockInfo",
    "HostPages",
    "KVCacheAllocator",
    "KVCacheBlock",
    "KVCacheBlocks",
    "KVCacheTransfer",
    "KVPages",
    "LayerCache",
    "PagedKVCache",
    "swap_in",
    "swap_out",
]
