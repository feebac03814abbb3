"""A control step run in one piece is the same step, in place."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import tables
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.tables import BlockTable
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU, in_one_piece


def step(table: BlockTable):
    ids = 5 + table.num_blocks
    table, ok = tables.append_rows(table, ids, jnp.arange(9, dtype=jnp.int32), jnp.full(8, 16))
    return table, (ok, tables.slots_of(table, jnp.arange(8), table.num_tokens - 1))


def test_the_step_runs_once_whatever_the_counter():
    table = BlockTable.create(BlockTableConfig(16, 8, 4))
    whole = jax.jit(lambda table, counter: in_one_piece(step, table, counter), compiler_options=CONTROL_STEP_ON_CPU)
    for counter in (0, 1, 2, -1, -2, 2**31 - 1, -(2**31)):
        chex.assert_trees_all_equal(whole(table, np.int32(counter)), jax.jit(step)(table))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU compiler does")
def test_the_loop_survives_compilation_and_the_table_stays_in_place():
    """Unrolled, it would be spread over threads again."""
    table = jax.eval_shape(lambda: BlockTable.create(BlockTableConfig(16, 8, 100_000)))
    whole = jax.jit(lambda table: in_one_piece(step, table, table.num_blocks[0]), donate_argnums=0)
    compiled = whole.lower(table).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert "while(" in entry
    assert "s32[8,100000]{1,0} fusion(" not in entry
    assert compiled.memory_analysis().temp_size_in_bytes < 50_000
