"""Whether the nodes of a sparse table are what its rows need, no more and no fewer, each in one place."""

from __future__ import annotations

import numpy as np

from pyagent_kv_jax.tables import SparseBlockTable
from tests.tables.table_model import TableModel


def check_nodes(table: SparseBlockTable, model: TableModel) -> None:
    """By a walk from the roots, in plain Python."""
    nodes, owner, fan_out = np.asarray(table.nodes), np.asarray(table.owner), table.fan_out
    seen: list[int] = []

    def walk(node: int, row: int, span: int, first: int) -> dict[int, int]:
        seen.append(node)
        assert owner[node] == row
        found = {first + place * span // fan_out: int(x) for place, x in enumerate(nodes[node]) if x >= 0}
        if span == fan_out:
            return found
        assert found  # no node without a block
        return {k: v for at, child in found.items() for k, v in walk(child, row, span // fan_out, at).items()}

    for row, root in enumerate(np.asarray(table.roots).tolist()):
        blocks = {} if root < 0 else walk(root, row, model.spans[-1], 0)
        assert blocks == {c: block for c, block in enumerate(model.blocks[row]) if block >= 0}
        assert len(seen) == sum(len(model.nodes(r)) for r in range(row + 1))
    free = np.asarray(table.free_nodes)[: int(table.num_free_nodes)].tolist()
    assert len(free) == model.num_free_nodes()
    assert len(set(seen + free)) == len(seen) + len(free)
    assert (np.delete(owner, seen) == -1).all()
