"""For Linen: attention that keeps its K and V in pages."""

from pyagent_kv_jax.flax.linen import cache_state_dict as _registered  # noqa: F401
from pyagent_kv_jax.flax.linen.paged_multi_head_attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    PagedMultiHeadDotProductAttention,
)

__all__ = ["MultiHeadAttention", "MultiHeadDotProductAttention", "PagedMultiHeadDotProductAttention"]
