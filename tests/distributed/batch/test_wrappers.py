"""Every wrapper's outputs and LSE equal attention over lists of tokens in float64, for every kind of batch."""

from __future__ import annotations

import pytest

from pyagent_kv_jax.distributed import AllReduceStrategy, CacheSharding, Combine
from pyagent_kv_jax.distributed.batch import (
    BatchDCPDecodeWrapper,
    BatchDCPPrefillWrapper,
    BatchPhase,
    UnifiedBatchWrapper,
)
from tests.distributed.attention_on_mesh import STEPS
from tests.distributed.batch.steps_on_mesh import Steps, plan_config
from tests.distributed.meshes import cpu_mesh

# dcp, tp, interleave, combine, query heads, KV heads. Of 24 query heads over 6 ranks and 8 KV heads, ranks own 4 of
# groups of 3: groups are cut. One KV head on 2 tensor ranks is stored twice.
CASES = {
    "4x2 to all": (4, 2, 4, Combine.ALL_TO_ALL, 16, 2),
    "3x2 reduce-scatter": (3, 2, 1, Combine.REDUCE_SCATTER, 24, 8),
    "2x2 tree": (2, 2, 16, Combine.ALL_REDUCE, 6, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_kinds_of_batches(case: tuple[int, int, int, Combine, int, int]) -> None:
    dcp, tp, interleave, combine, q_heads, kv_heads = case
    mesh, strategy = cpu_mesh(dcp=dcp, tp=tp), AllReduceStrategy.TREE
    config = plan_config(CacheSharding(mesh, "dcp", "tp", interleave, combine, strategy), q_heads, kv_heads)
    prefill, decode, unified = (
        wrapper(config) for wrapper in (BatchDCPPrefillWrapper, BatchDCPDecodeWrapper, UnifiedBatchWrapper)
    )
    steps = Steps.start(config)
    first = prefill.plan(steps.requests(STEPS["prefill"]))
    assert not first.has_context
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
    # Three programs: without context, ragged with context, a token each.
    stats = [wrapper.get_stats() for wrapper in (prefill, decode, unified)]
    assert sum(one.num_compilations for one in stats) == 3
    assert [one.num_plans for one in stats] == [2, 3, 2]
