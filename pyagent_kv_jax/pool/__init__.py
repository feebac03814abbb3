"""Floor 2: which block is whose."""

from pyagent_kv_jax.pool.admission import Admission
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.pool.invariants import check_invariants

__all__ = ["Admission", "BlockPool", "check_invariants"]
