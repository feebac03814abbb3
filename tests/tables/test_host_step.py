"""The options for control steps: known to this XLA, the same step, in place."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

from pyagent_kv_jax import tables
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.tables import BlockTable
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU


def step(table: BlockTable):
    ids = 5 + table.num_blocks
    table, ok = tables.append_rows(table, ids, jnp.arange(9, dtype=jnp.int32), jnp.full(8, 16))
    return table, (ok, tables.slots_of(table, jnp.arange(8), table.num_tokens - 1))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of XLA's CPU compiler")
def test_the_options_are_known_and_change_no_result():
    table = BlockTable.create(BlockTableConfig(16, 8, 4))
    with_options = jax.jit(step, compiler_options=CONTROL_STEP_ON_CPU)
    chex.assert_trees_all_equal(with_options(table), jax.jit(step)(table))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of XLA's CPU compiler")
def test_the_table_stays_in_place():
    table = jax.eval_shape(lambda: BlockTable.create(BlockTableConfig(16, 8, 100_000)))
    compiled = jax.jit(step, donate_argnums=0, compiler_options=CONTROL_STEP_ON_CPU).lower(table).compile()
    assert "s32[8,100000]{1,0} copy(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 50_000
