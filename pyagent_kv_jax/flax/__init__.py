"""Beside floor 4: modules to import in Flax code."""

from pyagent_kv_jax.flax.paged_multi_head_attention import PagedMultiHeadAttention

__all__ = ["PagedMultiHeadAttention"]
