"""Every wrapper's outputs and LSE equal attention over lists of tokens in float64, for every kind of batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import DType
from pyagent_kv_jax.distributed import AllReduceStrategy, CacheSharding, Combine, ShardedKVPages
from pyagent_kv_jax.distributed.batch import (
    BatchDCPDecodeWrapper,
    BatchDCPPrefillWrapper,
    BatchPhase,
    UnifiedBatchWrapper,
    attend_planned,
)
from tests.distributed.attention_on_mesh import LAYERS, STEPS
from tests.distributed.batch.steps_on_mesh import Steps, plan_config, requests_for
from tests.distributed.meshes import cpu_mesh

ALL_TO_ALL, SCATTER, REDUCE = Combine
NCCL, RING, TREE, RECURSIVE = AllReduceStrategy

# dcp, tp, interleave, combine, strategy, query heads, KV heads. Where ranks own a part of their tensor rank's query
# heads, that part is a group of KV heads, a part of a group, or (4 heads, groups of 3) neither.
CASES = {
    "8x1": (8, 1, 1, SCATTER, NCCL, 24, 8),
    "4x2": (4, 2, 4, ALL_TO_ALL, NCCL, 16, 2),
    "2x4": (2, 4, 16, REDUCE, RECURSIVE, 8, 2),
    "1x8": (1, 8, 1, ALL_TO_ALL, NCCL, 8, 1),
    "3x2": (3, 2, 16, ALL_TO_ALL, NCCL, 24, 8),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_kinds_of_batches(case: tuple[int, int, int, Combine, AllReduceStrategy, int, int]) -> None:
    dcp, tp, interleave, combine, strategy, q_heads, kv_heads = case
    sharding = CacheSharding(cpu_mesh(dcp=dcp, tp=tp), "dcp", "tp", interleave, combine, strategy)
    config = plan_config(sharding, q_heads, kv_heads)
    prefill, decode, unified = (
        wrapper(config) for wrapper in (BatchDCPPrefillWrapper, BatchDCPDecodeWrapper, UnifiedBatchWrapper)
    )
    steps = Steps.start(config)
    first = prefill.plan(steps.requests(STEPS["prefill"]))
    assert first.has_context is (dcp == 1)
    assert first.phase is BatchPhase.PREFILL
    steps.run(prefill, first, seed=1)
    chunk = prefill.plan(steps.requests(STEPS["chunked prefill"], phase=BatchPhase.PREFILL))
    assert chunk.has_context
    steps.run(prefill, chunk, seed=2)
    once = decode.plan(steps.requests([1] * 6))
    assert once.phase is BatchPhase.DECODE
    assert once.meta.query_start_loc is None
    steps.run(decode, once, seed=3)
    steps.run(decode, decode.advance(once), seed=4)
    steps.process(unified, STEPS["mixed"], seed=5)
    steps.run(decode, decode.plan(steps.requests([3, 2, 0, 1, 4, 1], phase=BatchPhase.DECODE)), seed=6)  # speculative
    # Programs: without context, ragged with context, a token each.
    stats = [wrapper.get_stats() for wrapper in (prefill, decode, unified)]
    assert sum(one.num_compilations for one in stats) == (2 if dcp == 1 else 3)
    assert [one.num_plans for one in stats] == [2, 3, LAYERS]


@pytest.mark.parametrize("combine", [ALL_TO_ALL, REDUCE])
def test_windows_caps_scales_and_sinks(combine: Combine) -> None:
    sharding = CacheSharding(cpu_mesh(dcp=2, tp=2), "dcp", "tp", 4, combine, RING)
    wrapper = BatchDCPPrefillWrapper(config := plan_config(sharding, 8, 2))
    steps, sinks = Steps.start(config), np.linspace(-2, 3, 8).tolist()
    options: dict[str, Any] = {"logits_soft_cap": 1.5, "scale": 0.7, "sinks": sinks}
    compiled: list[int] = []
    for seed, (name, window) in enumerate((("prefill", 4), ("chunked prefill", 7), ("mixed", 4))):
        plan = wrapper.plan(steps.requests(STEPS[name], phase=BatchPhase.PREFILL))
        steps.run(wrapper, plan, seed, sliding_window=window, **options)
        compiled.append(wrapper.get_stats().num_compilations)
    assert compiled[1] == compiled[2]  # another window is no other program


def test_a_quantised_cache_is_seen_the_same_with_and_without_context() -> None:
    sharding = CacheSharding(cpu_mesh(dcp=3, tp=2), "dcp", "tp", 1, ALL_TO_ALL)
    config = plan_config(sharding, 24, 8, cache=[("dtype", DType.INT8)])
    assert config.activation_dtype is DType.FLOAT32
    scales = np.random.default_rng(0).uniform(0.03, 0.04, (2, LAYERS, 8))
    pages = ShardedKVPages.create(config.cache, sharding).with_scales(*jnp.asarray(scales, jnp.float32))
    prefill, decode = BatchDCPPrefillWrapper(config), BatchDCPDecodeWrapper(config)
    requests = requests_for(STEPS["prefill"], [0] * 6)
    alone, against_cache = prefill.plan(requests), decode.plan(requests)
    assert (alone.has_context, against_cache.has_context) == (False, True)
    arrays = Steps.start(config).arrays(0)
    for layer in range(LAYERS):
        out, lse, pages = prefill.run(alone, pages, layer, *(x[layer] for x in arrays))
        want, want_lse, pages = decode.run(against_cache, pages, layer, *(x[layer] for x in arrays))
        np.testing.assert_allclose(out, want, atol=1e-5)
        np.testing.assert_allclose(lse, want_lse, atol=1e-5)
        exact = Steps.start(config).contexts.attend(STEPS["prefill"], *arrays)[0]
        assert 1e-3 < np.abs(np.asarray(out) - exact[layer]).max() < 0.1  # quantised indeed


def test_padding_is_neither_written_nor_seen() -> None:
    sharding = CacheSharding(cpu_mesh(dcp=2, tp=2), "dcp", "tp", 4, REDUCE, NCCL)
    config = plan_config(sharding, 8, 2)
    wrapper, steps = BatchDCPPrefillWrapper(config), Steps.start(config)
    for lens, seed in ((STEPS["prefill"], 1), (STEPS["chunked prefill"], 2)):
        plan = wrapper.plan(steps.requests(lens, phase=BatchPhase.PREFILL))
        arrays = steps.arrays(seed)
        for x in arrays:
            x[:, sum(lens) :] = np.nan
        steps.compare(lambda layer, *parts, plan=plan: wrapper.run(plan, steps.pages, layer, *parts), lens, arrays)
    held = np.concatenate(steps.contexts.keys, axis=1)
    stored = np.asarray(steps.pages.k_pages)
    assert (~np.isnan(stored)).sum() == held.size


def test_plans_within_a_jit_of_ones_own() -> None:
    sharding = CacheSharding(cpu_mesh(dcp=2, tp=2), "dcp", "tp", 8, REDUCE, TREE)
    config = plan_config(sharding, 8, 2)
    wrapper, steps = BatchDCPPrefillWrapper(config), Steps.start(config)
    plan = wrapper.plan(steps.requests(STEPS["prefill"]))
    arrays = steps.arrays(1)

    @jax.jit
    def all_layers(pages: Any, plan: Any, arrays: Any) -> Any:
        def layer(pages: Any, inputs: Any) -> Any:
            out, lse, pages = attend_planned(pages, *inputs, plan.meta, plan.own_tokens)
            return pages, (out, lse)

        return jax.lax.scan(layer, pages, (jnp.arange(LAYERS), *arrays))

    _, (out, lse) = all_layers(steps.pages, plan, arrays)
    want, want_lse = steps.contexts.attend(STEPS["prefill"], *arrays)
    np.testing.assert_allclose(out, want, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_rows = 1
