"""Between floors 3 and 4: caches over the devices of a mesh."""

from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy, all_reduce_states
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.combine import Combine
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages, sharded_cache

__all__ = ["AllReduceStrategy", "CacheSharding", "Combine", "ShardedKVPages", "all_reduce_states", "sharded_cache"]
