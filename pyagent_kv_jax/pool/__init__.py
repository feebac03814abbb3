"""Floor 2: which block is whose."""

from pyagent_kv_jax.pool.admission import Admission
from pyagent_kv_jax.pool.allocation_strategy import (
    allocate_blocks,
    longest_free_run,
    node_of_block,
    require_allocated,
    require_nodes,
)
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.pool.invariants import check_invariants

__all__ = [
    "Admission",
    "BlockPool",
    "allocate_blocks",
    "check_invariants",
    "longest_free_run",
    "node_of_block",
    "require_allocated",
    "require_nodes",
]
