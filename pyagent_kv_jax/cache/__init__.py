"""Floor 3: the pages, and pool, table and pages moving together."""

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata, LayerCache
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache

__all__ = ["AttentionMetadata", "KVPages", "LayerCache", "PagedKVCache"]
