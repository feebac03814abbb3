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


def step(carry: tuple[BlockTable, tuple[jax.Array, jax.Array]]):
    table, _ = carry
    ids = 5 + table.num_blocks
    table, ok = tables.append_rows(table, ids, jnp.arange(9, dtype=jnp.int32), jnp.full(8, 16))
    return table, (ok, tables.slots_of(table, jnp.arange(8), table.num_tokens - 1))


def start():
    return BlockTable.create(BlockTableConfig(16, 8, 4)), (jnp.zeros(8, bool), jnp.zeros(8, jnp.int32))


def test_the_step_runs_once_whatever_the_counter():
    whole = jax.jit(lambda carry, counter: in_one_piece(step, carry, counter), compiler_options=CONTROL_STEP_ON_CPU)
    for counter in (0, 1, 2, -1, -2, 2**31 - 1, -(2**31)):
        chex.assert_trees_all_equal(whole(start(), np.int32(counter)), jax.jit(step)(start()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU compiler does")
def test_the_loop_survives_compilation_and_the_table_stays_in_place():
    """Unrolled, it would be spread over threads again."""
    carry = jax.eval_shape(lambda: (BlockTable.create(BlockTableConfig(16, 8, 100_000)), start()[1]))
    whole = jax.jit(lambda carry: in_one_piece(step, carry, carry[0].num_blocks[0]), donate_argnums=0)
    compiled = whole.lower(carry).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert "while(" in entry
    assert "s32[8,100000]{1,0} fusion(" not in entry
    assert compiled.memory_analysis().temp_size_in_bytes < 50_000
