"""One logical pool whose blocks live on the devices of a mesh axis: who gets which, pages, attention over them."""

from pyagent_kv_jax.distributed.owned.distributed_block_table import DistributedBlockTable
from pyagent_kv_jax.distributed.owned.owned_blocks import GivenBlocks
from pyagent_kv_jax.distributed.owned.owned_kv_pages import OwnedKVPages
from pyagent_kv_jax.distributed.owned.spill_plan import SpillPlan, plan_spill, spill_of_row

__all__ = ["DistributedBlockTable", "GivenBlocks", "OwnedKVPages", "SpillPlan", "plan_spill", "spill_of_row"]
