"""Floor 1: from a position in a sequence to a block, and to the slot in it."""

from pyagent_kv_jax.tables.block_table import BlockTable
from pyagent_kv_jax.tables.compressed_slot_mapping import CompressedSlotMapping, compress_slots
from pyagent_kv_jax.tables.cpu_gpu_buffer import CpuGpuBuffer
from pyagent_kv_jax.tables.rows import (
    RowBlocks,
    append_rows,
    clear_rows,
    get_blocks,
    release_rows,
    reorder_rows,
    rows_blocks,
    set_blocks,
)
from pyagent_kv_jax.tables.slot_mapping import (
    ContextParallel,
    SlotMapping,
    StepTokens,
    local_length,
    local_slots,
    slots_of,
    step_slots,
)
from pyagent_kv_jax.tables.sparse_block_table import SparseBlockTable

__all__ = [
    "BlockTable",
    "CompressedSlotMapping",
    "ContextParallel",
    "CpuGpuBuffer",
    "RowBlocks",
    "SlotMapping",
    "SparseBlockTable",
    "StepTokens",
    "append_rows",
    "clear_rows",
    "compress_slots",
    "get_blocks",
    "local_length",
    "local_slots",
    "release_rows",
    "reorder_rows",
    "rows_blocks",
    "set_blocks",
    "slots_of",
    "step_slots",
]
