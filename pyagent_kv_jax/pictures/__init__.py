"""Pictures of what the caches do. Pure functions: they take our objects or plain arrays, and return a figure.

Nothing is shown or saved, and ``pyplot`` is never touched: a figure shows itself when it is the value of a notebook's
cell (``Picture``). In axes of one's own (``ax=...``) the same is drawn beside other things.
"""

from pyagent_kv_jax.pictures.block_map import block_map
from pyagent_kv_jax.pictures.block_owners import BlockOwners, block_owners
from pyagent_kv_jax.pictures.blocks_over_time import BlocksPanel, blocks_over_time
from pyagent_kv_jax.pictures.memory_over_time import MemoryHistory, MemoryRecorder, memory_over_time
from pyagent_kv_jax.pictures.prefix_tree import PrefixRun, prefix_runs, prefix_tree
from pyagent_kv_jax.pictures.roofline import KernelPoint, kernel_points, roofline
from pyagent_kv_jax.pictures.style import Picture
from pyagent_kv_jax.pictures.waste_by_block_size import empty_share, waste_by_block_size

__all__ = [
    "BlockOwners",
    "BlocksPanel",
    "KernelPoint",
    "MemoryHistory",
    "MemoryRecorder",
    "Picture",
    "PrefixRun",
    "block_map",
    "block_owners",
    "blocks_over_time",
    "empty_share",
    "kernel_points",
    "memory_over_time",
    "prefix_runs",
    "prefix_tree",
    "roofline",
    "waste_by_block_size",
]
