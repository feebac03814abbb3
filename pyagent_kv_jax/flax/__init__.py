"""Beside floor 4: modules to import in Flax code."""

from pyagent_kv_jax.flax.paged_multi_head_attention import PagedMultiHeadAttention
from pyagent_kv_jax.flax.shared_kv_cache import LayerHandle, SharedKVCache

__all__ = ["LayerHandle", "PagedMultiHeadAttention", "SharedKVCache"]
