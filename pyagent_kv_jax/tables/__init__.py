"""Floor 1: from a position in a sequence to a block, and to the slot in it."""

from pyagent_kv_jax.tables.block_table import BlockTable
from pyagent_kv_jax.tables.cpu_gpu_buffer import CpuGpuBuffer
from pyagent_kv_jax.tables.rows import (
    RowBlocks,
    append_rows,
    clear_rows,
    release_rows,
    reorder_rows,
    rows_blocks,
)
from pyagent_kv_jax.tables.slot_mapping import (
    ContextParallel,
    SlotMapping,
    StepTokens,
    local_length,
    slots_of,
    step_slots,
)

__all__ = [
    "BlockTable",
    "ContextParallel",
    "CpuGpuBuffer",
    "RowBlocks",
    "SlotMapping",
    "StepTokens",
    "append_rows",
    "clear_rows",
    "local_length",
    "release_rows",
    "reorder_rows",
    "rows_blocks",
    "slots_of",
    "step_slots",
]
