"""For Linen: attention that keeps its K and V in pages."""

from pyagent_kv_jax.flax.linen import cache_state_dict as _registered  # noqa: F401
from pyagent_kv_jax.flax.linen.paged_multi_head_attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    PagedMultiHeadDotProductAttention,
)
from pyagent_kv_jax.flax.linen.shared_kv_cache import apply_with_cache, attend, cache_collection, cache_of, has_cache

__all__ = [
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "PagedMultiHeadDotProductAttention",
    "apply_with_cache",
    "attend",
    "cache_collection",
    "cache_of",
    "has_cache",
]
