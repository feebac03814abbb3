"""What only the sparse form has: its size, its limits, and the way to the dense form and back."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import tables
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import ConfigError, TableFullError
from pyagent_kv_jax.tables import BlockTable, SparseBlockTable
from pyagent_kv_jax.tables.sparse_block_table import nodes_for
from tests.tables.forms import CONFIG, dense, sparse, sparse_model
from tests.tables.sparse_checks import check_nodes
from tests.tables.table_model import TableModel


def test_bytes_follow_the_blocks_in_use():
    """340,000 blocks of 4,096 requests of up to 131,072 tokens."""
    config = BlockTableConfig(16, 4096, 8192)
    dense = jax.eval_shape(lambda: BlockTable.create(config))
    assert dense.nbytes == 4096 * 8192 * 4 + 2 * 4096 * 4
    assert jax.eval_shape(lambda: SparseBlockTable.create(config, 340_000)).nbytes * 20 < dense.nbytes
    assert jax.eval_shape(lambda: SparseBlockTable.create(config)).nbytes * 20 < dense.nbytes


def test_columns_whose_digits_outnumber_an_int32():
    """Four levels of 256: 2**32 columns, of which the row has 2**24 + 1."""
    table = SparseBlockTable.create(BlockTableConfig(1, 1, 2**24 + 1), 2)
    assert (table.fan_out, table.num_nodes) == (256, 4)
    assert int(table.set_block(0, 2**24, 7).get_block(0, 2**24)) == 7


@pytest.mark.parametrize("fan_out", [2, 3, 8])
def test_nodes_are_enough_for_any_rows_and_hardly_more(fan_out):
    """Every way in which three rows can hold up to seven blocks each."""
    most: dict[int, int] = defaultdict(int)
    for lengths in product(range(8), repeat=3):
        model = TableModel(3, 7, 4, fan_out)
        wanted = sum(len(model.nodes(row, list(range(n)))) for row, n in enumerate(lengths))
        most[sum(lengths)] = max(most[sum(lengths)], wanted)
    given = [nodes_for(BlockTableConfig(4, 3, 7), n, fan_out) for n in range(1, 22)]
    needed = np.maximum.accumulate([most[n] for n in range(1, 22)])
    assert (given >= needed).all()
    assert (given <= needed + 1).all()


def test_to_dense_and_back():
    """Three blocks always fit: 9 nodes, and these four take 7."""
    model = sparse_model(9)
    table = dense().append_row(1, [7, 3], 5).set_block(1, 3, 8).append_row(2, [0], 1)
    model.append(1, [7, 3], 5)
    model.set(1, 3, 8)
    model.append(2, [0], 1)
    made = SparseBlockTable.from_dense(table, 3, 2)
    check_nodes(made, model)
    chex.assert_trees_all_equal(made.to_block_table(), table)


def test_a_dense_table_that_does_not_fit():
    few = dense().append_row(1, [7, 3], 5)
    many = few.set_block(3, 4, 8).set_block(1, 4, 2).append_row(2, [0], 1)
    with pytest.raises(TableFullError, match="got 5 blocks that need 11 more nodes, want at most the 9 free"):
        SparseBlockTable.from_dense(many, 3, 2)
    traced = jax.jit(lambda t: SparseBlockTable.from_dense(t, 3, 2).to_block_table())
    chex.assert_trees_all_equal(traced(many), dense())
    chex.assert_trees_all_equal(traced(few), few)


def test_a_full_table_refuses_and_stays_as_it_was():
    """6 nodes are one full row, or two rows that have begun."""
    full = sparse(6).append_row(0, [1, 2], 8).append_row(3, [3, 4], 8)
    assert full.num_free_nodes == 0
    for call in (lambda t: t.append_row(1, [5], 1), lambda t: t.set_block(3, 4, 5)):
        with pytest.raises(TableFullError, match=r"need [23] more nodes, want at most the 0 free"):
            call(full)
    chex.assert_trees_all_equal(jax.jit(call)(full), full)
    assert full.append_row(3, [], 0).set_block(3, 0, 9).get_row(3).tolist() == [9, 4, -1, -1, -1]
    row = full.clear_row(0).append_row(2, [6], 4).append_row(2, [7], 4).get_row(2)
    assert row.tolist() == [6, 7, -1, -1, -1]  # nothing of row 0 is left in its nodes


def test_nothing_is_asked_of_an_empty_batch():
    none = jnp.zeros(0, jnp.int32)
    table = sparse()
    _, ok = jax.jit(tables.append_rows)(table, none, jnp.zeros(5, jnp.int32), jnp.zeros(4, jnp.int32))
    assert ok.all()
    assert jax.jit(tables.set_blocks)(table, none, none, none)[1]
    assert table.to_dense_rows([], 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "received"),
    [
        (partial(SparseBlockTable.create, num_blocks=0), "num_blocks: got 0"),
        (partial(SparseBlockTable.create, num_blocks=1.5), "num_blocks: got 1.5"),
        (partial(SparseBlockTable.create, fan_out=1), "fan_out: got 1, want an integer from 2 to 1024"),
        (partial(SparseBlockTable.create, fan_out="2"), "fan_out: got '2'"),
    ],
)
def test_sizes_that_are_none(call, received):
    with pytest.raises(ConfigError) as raised:
        call(CONFIG)
    assert received in str(raised.value)
