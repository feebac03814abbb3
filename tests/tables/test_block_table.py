"""One row at a time: errors, traced use, views, and what it costs."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pyagent_kv_jax import checking, tables
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    InvalidBlockError,
    RequestTooLongError,
    ShapeMismatchError,
)
from pyagent_kv_jax.tables import BlockTable, SlotMapping, SparseBlockTable
from tests.tables.forms import FORMS


def snapshot(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


@pytest.fixture(params=FORMS, scope="module")
def table(request):
    """Row 1: blocks 7, 3, 9 with 10 tokens; row 2: block 5 with 2; rows 0 and 3 empty."""
    table = FORMS[request.param]()
    return table.append_row(1, [7, 3, 9], 10).append_row(2, [5], 2)


def test_rows_and_counts(table):
    assert table.get_row(1).tolist() == [7, 3, 9, -1, -1]
    assert table.get_num_blocks(1) == 3
    assert table.get_total_blocks() == 4
    assert table.append_row(1, jnp.array([2]), np.int64(6)).get_row(1).tolist() == [7, 3, 9, 2, -1]
    assert table.append_row(1, [], 2).num_tokens[1] == 12
    assert table.compute_slot_mapping(1, 5, 3).slots.tolist() == [31, 12, 13, 14, 15]
    assert table.update_slot_mapping([[1, 0], [-1, -1], [2, 1]]).slots.tolist() == [28, -1, 21]


def test_rows_whose_blocks_do_not_fit_are_not_released(table):
    release = jax.jit(tables.release_rows, static_argnums=2)
    after, released = release(table.append_row(0, [1], 1), np.array([True, True, True, False]), 3)
    assert released.ok.tolist() == [True, False, False, True]
    assert released.ids.tolist() == [1, -1, -1]
    assert after.num_blocks.tolist() == [0, 3, 1, 0]
    assert after.to_dense_rows([0, 1, 2], 3).tolist() == [[-1] * 3, [7, 3, 9], [5, -1, -1]]


BAD_CALLS = [
    (lambda t: t.append_row(4, [1], 1), InvalidArgumentError, "got 4, want a row in [0, 4)"),
    (lambda t: t.append_row(-1, [1], 1), InvalidArgumentError, "got -1"),
    (lambda t: t.append_row(1.0, [1], 1), InvalidArgumentError, "got 1.0"),
    (lambda t: t.append_row(1, [1, 2, 4], 1), RequestTooLongError, "got 3 more blocks, want at most 2"),
    (lambda t: t.append_row(1, [4, -1, 2], 1), InvalidBlockError, "got -1"),
    (lambda t: t.append_row(1, [2**31], 1), InvalidBlockError, f"got {2**31}"),
    (
        lambda t: t.append_row(1, [2**29 - 2, 2**29 - 1], 1),
        InvalidBlockError,
        f"got {2**29 - 1}, want 0 to {2**29 - 2}",
    ),
    (lambda t: t.append_row(1, [0.5], 1), ShapeMismatchError, "float64[1]"),
    (lambda t: t.append_row(1, [[4]], 1), ShapeMismatchError, "[1, 1]"),
    (lambda t: t.append_row(1, [4], -1), InvalidArgumentError, "got -1"),
    (lambda t: t.append_row(1, [4], 2**31 - 1), InvalidArgumentError, f"got {2**31 - 1}"),
    (lambda t: t.append_row(1, [4], 7), InvalidArgumentError, "got 7 for row 1, want at most 6"),
    (lambda t: t.set_block(4, 0, 1), InvalidArgumentError, "got 4"),
    (lambda t: t.set_block(0, -1, 1), InvalidArgumentError, "columns: got -1"),
    (lambda t: t.set_block(0, 5, 1), RequestTooLongError, "row 0: got column 5, want one of its 5"),
    (lambda t: t.set_block(0, 4, -1), InvalidBlockError, "got -1"),
    (lambda t: t.set_block(0, 4, 2**29 - 1), InvalidBlockError, f"want 0 to {2**29 - 2}"),
    (lambda t: t.set_block(0, 1.0, 1), InvalidArgumentError, "position: got 1.0"),
    (lambda t: t.set_blocks([0, -2, 1], [1, 1, 1], [1, 1, 1]), InvalidArgumentError, "rows: got -2"),
    (lambda t: t.set_blocks([0, -1, 0], [1, 1, 1], [5, 5, 6]), InvalidArgumentError, "got 1 of row 0 twice"),
    (lambda t: t.set_blocks([0, 1], [1], [5, 5]), ShapeMismatchError, "columns: got int64[1], want int32[2]"),
    (lambda t: t.set_blocks([0], [1], [2**31]), InvalidArgumentError, f"block_ids: got {2**31}"),
    (lambda t: t.get_block(4, 0), InvalidArgumentError, "got 4"),
    (lambda t: t.get_block(0, -1), InvalidArgumentError, "position: got -1"),
    (lambda t: t.get_blocks([0.5], [1]), ShapeMismatchError, "rows: got float64[1]"),
    (lambda t: t.get_blocks(jnp.array([2**32 - 1], jnp.uint32), [1]), InvalidArgumentError, f"rows: got {2**32 - 1}"),
    (lambda t: t.update_slot_mapping(np.array([[1, 2**32]])), InvalidArgumentError, f"1 .. {2**32}"),
    (lambda t: t.get_slot(0, -1), InvalidArgumentError, "position: got -1"),
    (lambda t: t.get_slots([0], [[1]]), ShapeMismatchError, "positions: got int64[1, 1]"),
    (lambda t: t.to_dense(4, 2), InvalidArgumentError, "got 4"),
    (lambda t: t.to_dense(0, -1), InvalidArgumentError, "max_blocks: got -1"),
    (lambda t: t.to_dense_rows(0, 1), ShapeMismatchError, "rows: got int64[]"),
    (lambda t: t.kernel_block_tables(max_blocks=0.5), InvalidArgumentError, "max_blocks: got 0.5"),
    (lambda t: t.get_row(9), InvalidArgumentError, "got 9"),
    (lambda t: t.get_num_blocks(-2), InvalidArgumentError, "got -2"),
    (lambda t: t.clear_row(4), InvalidArgumentError, "got 4"),
    (lambda t: t.move_row(1, 2), InvalidArgumentError, "dst=2 holds blocks"),
    (lambda t: t.move_row(1, 4), InvalidArgumentError, "dst: got 4"),
    (lambda t: t.swap_rows(-1, 2), InvalidArgumentError, "a: got -1"),
    (lambda t: t.compute_slot_mapping(1, 4, 7), InvalidArgumentError, "got 4 tokens from position 7 on"),
    (lambda t: t.compute_slot_mapping(1, -1, 0), InvalidArgumentError, "got -1"),
    (lambda t: t.compute_slot_mapping(1, 1.5, 0), InvalidArgumentError, "got 1.5"),
    (lambda t: t.compute_slot_mapping(1, 1, -1), InvalidArgumentError, "from position -1"),
    (lambda t: t.update_slot_mapping([[1, 10]]), InvalidArgumentError, "got row 1, position 10"),
    (lambda t: t.update_slot_mapping([[4, 0]]), InvalidArgumentError, "got row 4, position 0"),
    (lambda t: t.update_slot_mapping([1, 2]), ShapeMismatchError, "[2]"),
    (lambda t: t.update_slot_mapping([[0.5, 1]]), ShapeMismatchError, "float64"),
]


@pytest.mark.parametrize(("call", "error", "received"), BAD_CALLS)
def test_bad_input_raises_and_changes_nothing(table, call, error, received):
    before = snapshot(table)
    with pytest.raises(error) as raised:
        call(table)
    assert received in str(raised.value)
    assert "want" in str(raised.value)
    chex.assert_trees_all_equal(snapshot(table), before)


def test_methods_never_invalidate_the_table(table):
    before = snapshot(table)
    table.append_row(0, [1], 1)
    table.clear_row(1)
    table.move_row(1, 0)
    table.swap_rows(1, 2)
    table.set_block(1, 4, 2)
    chex.assert_trees_all_equal(snapshot(table), before)


TRACED = {
    "append_row": (lambda t, row: t.append_row(row, jnp.array([8, 6]), 3), [0, 1, 3], [4, -1]),
    "append_row, long": (lambda t, row: t.append_row(row, jnp.array([8, 6, 4]), 3), [0, 2], [1]),
    "set_block": (lambda t, row: t.set_block(row, 4, 8), [0, 1, 3], [4, -1]),
    "set_block, column": (lambda t, column: t.set_block(1, column, 8), [0, 3, 4], [5, -1]),
    "clear_row": (lambda t, row: t.clear_row(row), [0, 1, 2], [4, -1]),
    "move_row": (lambda t, row: t.move_row(1, row), [0, 1, 3], [2, 4, -1]),
    "swap_rows": (lambda t, row: t.swap_rows(row, 2), [0, 1, 2], [4, -1]),
}


one_form = pytest.mark.parametrize("table", ["dense"], indirect=True)  # what is traced here is the same for all


@one_form
@pytest.mark.parametrize("name", TRACED)
def test_traced_as_eagerly_and_bad_input_changes_nothing(table, name):
    method, right, wrong = TRACED[name]
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(method, n=1))
    for row in right:
        chex.assert_trees_all_equal(traced(table, row), method(table, row))
    for row in wrong:
        chex.assert_trees_all_equal(traced(table, row), table)


@one_form
@pytest.mark.parametrize("name", TRACED)
def test_bad_input_is_an_error_in_checking_mode(table, name):
    method, right, wrong = TRACED[name]
    checked = jax.jit(checkify.checkify(method))
    with checking():
        for row in right:
            checked(table, row)[0].throw()
        for row in wrong:
            with pytest.raises(checkify.JaxRuntimeError, match="Error: "):
                checked(table, row)[0].throw()


def test_many_methods_in_one_program():
    table = FORMS["sparse"]().append_row(1, [7, 3, 9], 10).append_row(2, [5], 2)

    def change(table, row):
        table = table.append_row(row, jnp.array([8]), 3).set_block(row, 4, 2).swap_rows(row, 2).clear_row(row)
        return table.move_row(1, row)

    traced = jax.jit(change)
    chex.assert_trees_all_equal(traced(table, 0), change(table, 0))
    chex.assert_trees_all_equal(traced(table, 4), table)


def test_traced_reads_of_what_is_not_there(table):
    def read(table, row):
        one = table.get_row(row), table.get_num_blocks(row), table.get_block(row, 2), table.get_slot(row, 9)
        return [*one, table.compute_slot_mapping(row, 2, 9).slots]

    read = jax.jit(read)
    assert [x.tolist() for x in read(table, 1)] == [[7, 3, 9, -1, -1], 3, 9, 37, [37, -1]]
    assert [x.tolist() for x in read(table, 4)] == [[-1] * 5, 0, -1, -1, [-1, -1]]
    assert [x.tolist() for x in read(table, -1)] == [[-1] * 5, 0, -1, -1, [-1, -1]]


def test_slot_mapping_keeps_its_length(table):
    mapping = SlotMapping(jnp.arange(4, dtype=jnp.int32)).update_slot_mapping(table, [[1, 9], [2, 0]])
    assert mapping.slots.tolist() == [37, 20, -1, -1]
    assert mapping.num_tokens == 4
    with pytest.raises(ShapeMismatchError, match="got 2 tokens, want at most 1"):
        SlotMapping(jnp.zeros(1, jnp.int32)).update_slot_mapping(table, [[1, 9], [2, 0]])


def test_hybrid_block_sizes_split_blocks_and_keep_slots():
    config = BlockTableConfig(block_size=6, max_num_reqs=2, max_num_blocks_per_req=3, kernel_block_size=2)
    table = BlockTable.create(config).append_row(1, [4, 0], 11)
    kernel = table.kernel_block_tables()
    assert kernel.tolist() == [[-1] * 9, [12, 13, 14, 0, 1, 2, -1, -1, -1]]
    assert table.kernel_block_tables([1, -1], 1).tolist() == [[12, 13, 14], [-1] * 3]
    slots = table.compute_slot_mapping(1, 11, 0).slots
    assert slots.tolist() == [int(kernel[1, p // 2]) * 2 + p % 2 for p in range(11)]


LARGE = BlockTableConfig(16, 256, 32_768)  # 32 MiB of rows
LARGE_FORMS = {
    "dense": lambda: BlockTable.create(LARGE),
    "sparse": lambda: SparseBlockTable.create(LARGE, num_blocks=8_000_000),
}


@pytest.mark.parametrize("form", LARGE_FORMS)
def test_a_large_table_is_updated_in_place(form):
    """Append, release, append again and read slots, over 32 MiB of blocks: no copy of them."""

    def step(table, ids, offsets, tokens, mask):
        table, ok = tables.append_rows(table, ids, offsets, tokens)
        table, released = tables.release_rows(table, mask, 512)
        table, again = tables.append_rows(table, released.ids, released.row_offsets, tokens)
        slots = tables.slots_of(table, jnp.arange(256, dtype=jnp.int32), table.num_tokens - 1)
        return table, (ok, slots, again)

    table = jax.eval_shape(LARGE_FORMS[form])
    i32 = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (256, 257, 256)]
    compiled = jax.jit(step, donate_argnums=0).lower(table, *i32, jax.ShapeDtypeStruct((256,), bool)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= table.nbytes >= 31 * 2**20
    most = 3_000_000  # eight rows cleared together are 1 MiB
    if form == "sparse":
        most = 4 * table.owner.size * 4  # clearing may pass over the nodes' owners
    assert memory.temp_size_in_bytes < most
