"""The forms of a table that the tests go through, in one size, so that each operation compiles once for each form."""

from __future__ import annotations

import dataclasses

import numpy as np

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.tables import BlockTable, SparseBlockTable
from tests.tables.table_model import TableModel

ROWS, WIDTH, BLOCK = 4, 5, 4
CONFIG = BlockTableConfig(BLOCK, ROWS, WIDTH, kernel_block_size=2)  # each block is 2 kernel blocks
FAN_OUT, ALL_NODES = 2, 24  # three levels; 6 nodes of a full row


def dense() -> BlockTable:
    return BlockTable.create(CONFIG)


def sparse(num_nodes: int = ALL_NODES) -> SparseBlockTable:
    """With room for everything, or for so few nodes: the stack of free ones then lacks the others."""
    table = SparseBlockTable.create(CONFIG, ROWS * WIDTH, FAN_OUT)
    assert table.num_nodes == ALL_NODES
    return dataclasses.replace(table, num_free_nodes=np.int32(num_nodes))


def sparse_model(num_nodes: int = ALL_NODES) -> TableModel:
    return TableModel(ROWS, WIDTH, BLOCK, FAN_OUT, num_nodes)


FORMS = {"dense": dense, "sparse": sparse}
