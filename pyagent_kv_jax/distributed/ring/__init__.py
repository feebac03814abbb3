"""Causal attention over a sequence that is sharded over ranks, in an order in which none of them idles."""

from pyagent_kv_jax.distributed.ring.ring_attention import ring_attention, ring_attention_on_rank
from pyagent_kv_jax.distributed.ring.zigzag import zigzag_positions, zigzag_shard, zigzag_unshard

__all__ = ["ring_attention", "ring_attention_on_rank", "zigzag_positions", "zigzag_shard", "zigzag_unshard"]
