"""What the compiled programs hold: the collectives that were counted by hand, and no copy of the pages."""

from __future__ import annotations

from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax.distributed import AllReduceStrategy, CacheSharding, Combine, ShardedKVPages
from pyagent_kv_jax.distributed.batch import (
    BatchDCPDecodeWrapper,
    BatchDCPPrefillWrapper,
    DCPPlanConfig,
    ExecutionPlan,
    attend_planned,
    collectives_of,
    step_bytes,
)
from pyagent_kv_jax.distributed.batch.communication import received_bytes
from pyagent_kv_jax.distributed.batch.planned_attention import compiled_attention
from tests.distributed.attention_on_mesh import DIM, ROWS, TOKENS
from tests.distributed.batch.steps_on_mesh import Steps, plan_config, poisoned_pages, requests_for
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh

Q_HEADS, KV_HEADS = 12, 2
FORMS: dict[str, tuple[Combine, AllReduceStrategy]] = {
    "all to all": (Combine.ALL_TO_ALL, AllReduceStrategy.NCCL),
    "reduce-scatter": (Combine.REDUCE_SCATTER, AllReduceStrategy.NCCL),
    **{strategy.value: (Combine.ALL_REDUCE, strategy) for strategy in AllReduceStrategy},
}


def config_of(form: str, dcp: int = 3, tp: int = 2, **sizes: Any) -> DCPPlanConfig:
    sharding = CacheSharding(cpu_mesh(dcp=dcp, tp=tp), "dcp", "tp", 1, *FORMS[form])
    return plan_config(sharding, Q_HEADS, KV_HEADS, **sizes)


def compiled(plan: ExecutionPlan, pages: ShardedKVPages | None = None) -> jax.stages.Compiled:
    """``run`` of one layer as it would be compiled for a model's arrays, which lie where they should."""
    config = plan.config
    q_place, kv_place = config.q_sharding, config.kv_sharding

    def array(heads: int, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((plan.num_tokens, heads, DIM), jnp.float32, sharding=place)

    kv = array(KV_HEADS, kv_place)
    pages = pages or ShardedKVPages.create(config.cache, config.sharding)
    arguments = (pages, np.int32(0), array(Q_HEADS, q_place), kv, kv, plan.meta, plan.own_tokens, {}, ())
    return compiled_attention(config).run.lower(*arguments).compile()


def plan_of(config: DCPPlanConfig, contexts: Any = (0,) * ROWS) -> ExecutionPlan:
    return BatchDCPPrefillWrapper(config).plan(requests_for([9, 3, 1, 0, 20, 5], contexts))


@cache
def compiled_form(form: str, has_context: bool, num_tokens: int = TOKENS) -> tuple[ExecutionPlan, jax.stages.Compiled]:
    contexts = (0, 0, 0, 0, 1, 0) if has_context else (0,) * ROWS
    plan = plan_of(config_of(form, token_buckets=(num_tokens,)), contexts)
    assert plan.has_context is has_context
    return plan, compiled(plan)


@pytest.mark.parametrize("form", FORMS)
def test_collectives_are_those_counted_by_hand(form: str) -> None:
    states = TOKENS * Q_HEADS // 2
    piece = states // 3  # divides
    want = {
        "all to all": [("all-gather", states * DIM * 4), ("all-to-all", states * (DIM + 1) * 4)],
        "reduce-scatter": [
            ("all-gather", 3 * states * 4),
            ("all-gather", states * DIM * 4),
            ("reduce-scatter", states // 3 * DIM * 4),
        ],
        "nccl": [("all-reduce", states * 4), ("all-reduce", states * (DIM + 1) * 4)],
        "ring": [("collective-permute", piece * (DIM + 1) * 4)] * 4,
        "tree": [("collective-permute", states * (DIM + 1) * 4)] * 3,
        "recursive": [("collective-permute", states * (DIM + 1) * size) for size in (4, 4, 2, 2)],
    }[form]
    config = config_of(form)
    counted = collectives_of(config, TOKENS, has_context=True)
    assert sorted((one.op, one.result_bytes) for one in counted) == sorted(want)
    assert collectives(compiled_form(form, has_context=True)[1]) == sorted(want)


@pytest.mark.parametrize("form", ["all to all", "ring"])
def test_without_context_nothing_is_exchanged(form: str) -> None:
    plan, program = compiled_form(form, has_context=False)
    assert collectives_of(plan.config, TOKENS, has_context=False) == ()
    assert collectives(program) == []


def test_what_a_rank_receives_counted_by_hand() -> None:
    states = TOKENS * Q_HEADS // 2
    want = {
        "all to all": (states * DIM * 4 + states * (DIM + 1) * 4) * 2 // 3,
        "reduce-scatter": states * DIM * 4 * 2 // 3 + states * 4 * 2 + states // 3 * DIM * 4 * 2,
        "nccl": 4 * states * 4 // 3 + 4 * states * (DIM + 1) * 4 // 3,
        "ring": 4 * states // 3 * (DIM + 1) * 4,
        "tree": 3 * states * (DIM + 1) * 4,
        "recursive": 3 * states * (DIM + 1) * 4,
    }
    for form, count in want.items():
        assert received_bytes(config_of(form), TOKENS, has_context=True) == count, form
    assert received_bytes(config_of("tree", dcp=1), TOKENS, has_context=True) == 0


@pytest.mark.parametrize(("form", "has_context"), [("all to all", True), ("ring", False)])
def test_a_program_needs_no_more_memory_than_counted(form: str, has_context: bool) -> None:
    needed, counted = [], []
    for num_tokens in (8 * TOKENS, 16 * TOKENS):  # tiles of the kernel are of full size
        plan, program = compiled_form(form, has_context, num_tokens)
        memory = program.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        needed.append(memory.temp_size_in_bytes + results + arguments)
        counted.append(step_bytes(plan.config, plan.num_rows, num_tokens, has_context=has_context))
    grown = counted[1] - counted[0]
    assert grown / 2 < needed[1] - needed[0] <= grown


@pytest.mark.parametrize("contexts", [(0,) * ROWS, (3,) * ROWS], ids=["self", "context"])
def test_pages_are_written_in_place(contexts: tuple[int, ...]) -> None:
    config = config_of("all to all", cache={"num_blocks": 50_000}.items())
    cache, place = config.cache, config.sharding.named(config.sharding.page_spec())
    shape = (cache.num_layers * cache.pool_blocks, KV_HEADS, cache.block_size, DIM)
    stored = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    pages = ShardedKVPages(stored, stored, None, None, cache, config.sharding)
    memory = compiled(plan_of(config, contexts), pages).memory_analysis()
    on_a_device = 2 * stored.size * 4 // 6
    assert memory.alias_size_in_bytes == on_a_device
    assert memory.temp_size_in_bytes < on_a_device // 100


def test_a_run_is_one_compiled_call_reused_while_shapes_hold() -> None:
    config = config_of("all to all", row_buckets=(4, 8))
    wrapper, plans = BatchDCPDecodeWrapper(config), []
    for rows in (3, 4, 2):
        plans.append(wrapper.plan(requests_for([1] * rows + [0] * (ROWS - rows), [7] * ROWS)[:rows]))
    traced = jax.jit(chex.assert_max_traces(attend_planned, n=1), donate_argnums=0)
    pages = poisoned_pages(config)
    _, k, v = arrays = Steps.start(config).arrays(0, 4)
    for layer, plan in enumerate((*plans, plans[0])):
        *_, pages = traced(pages, np.int32(layer % 2), *(x[0] for x in arrays), plan.meta, plan.own_tokens)
    for plan in plans:
        for layer in range(2):
            pages = wrapper.run(plan, pages, layer, arrays[0][layer], k[layer], v[layer]).pages
    stats = wrapper.get_stats()
    assert (stats.num_plans, stats.num_runs, stats.num_compilations) == (3, 6, 1)
    assert (stats.num_tokens, stats.num_padded_tokens, stats.num_layer_tokens) == (9, 3, 18)
    assert stats.bytes_exchanged == 6 * received_bytes(config, 4, has_context=True)
