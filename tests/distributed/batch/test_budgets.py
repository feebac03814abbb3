"""Requests of any number and size in batches that fit: every token once, in order, nothing over budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax.distributed import CacheSharding, Combine
from pyagent_kv_jax.distributed.batch import (
    BatchRequest,
    DCPPlanConfig,
    UnifiedBatchWrapper,
    make_plan,
    split_requests,
    step_bytes,
)
from pyagent_kv_jax.distributed.batch.batch_metadata import BatchMetadata
from pyagent_kv_jax.errors import ConfigError, DuplicateRequestError
from tests.distributed.attention_on_mesh import ROWS
from tests.distributed.batch.steps_on_mesh import Steps, plan_config, poisoned_pages, requests_for
from tests.distributed.meshes import cpu_mesh

MESH = cpu_mesh(dcp=2, tp=2)
ROW_BUCKETS, TOKEN_BUCKETS = (1, 2, 5), (6, 16, 32)


def config_of(combine: Combine, budget: int | None = None, **sizes: Any) -> DCPPlanConfig:
    sizes = {"row_buckets": ROW_BUCKETS, "token_buckets": TOKEN_BUCKETS, "memory_budget": budget, **sizes}
    return plan_config(CacheSharding(MESH, "dcp", "tp", 1, combine), 8, 2, slots=8, **sizes)


CONFIGS = {combine: config_of(combine) for combine in Combine}
SMALLEST = {
    combine: max(step_bytes(config, 1, tokens, has_context=context) for tokens in (1, 6) for context in (False, True))
    for combine, config in CONFIGS.items()
}
LARGEST = {combine: step_bytes(config, 5, 32, has_context=True) for combine, config in CONFIGS.items()}


@given(
    sizes=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([0, 0, 1, 7, 40])), min_size=1, max_size=9),
    combine=st.sampled_from(list(Combine)),
    share=st.none() | st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_every_token_once_in_order_and_within_budget(
    sizes: list[tuple[int, int]], combine: Combine, share: float | None
) -> None:
    budget = None if share is None else int(SMALLEST[combine] + share * (LARGEST[combine] - SMALLEST[combine]))
    config = config_of(combine, budget, cache=[("num_blocks", 400)])
    requests = [
        BatchRequest(f"{i}", range(i * 10, i * 10 + -(-(new + old) // 16)), new, old)
        for i, (new, old) in enumerate(sizes)
    ]
    batches = split_requests(requests, config)
    chunks = [chunk for batch in batches for chunk in batch]
    tokens = [
        (chunk.request_id, chunk.num_context_tokens + i) for chunk in chunks for i in range(chunk.num_query_tokens)
    ]
    assert tokens == [
        (request.request_id, request.num_context_tokens + i)
        for request in requests
        for i in range(request.num_query_tokens)
    ]
    assert list(dict.fromkeys(chunk.request_id for chunk in chunks)) == [request.request_id for request in requests]
    for batch in batches:
        lens = [chunk.num_query_tokens for chunk in batch]
        assert len(batch) <= ROW_BUCKETS[-1]
        assert sum(lens) <= TOKEN_BUCKETS[-1]
        rows = min(bucket for bucket in ROW_BUCKETS if bucket >= len(batch))
        padded = rows if lens == [1] * len(lens) else min(b for b in TOKEN_BUCKETS if b >= sum(lens))
        context = any(chunk.num_context_tokens for chunk in batch if chunk.num_query_tokens)
        assert budget is None or step_bytes(config, rows, padded, has_context=context) <= budget
        plan = make_plan(config, BatchMetadata.from_requests(batch, config.cache))
        assert (plan.num_rows, plan.num_tokens) == (rows, padded)


def test_nothing_is_cut_or_parted_without_need() -> None:
    config = config_of(Combine.ALL_TO_ALL)
    batches = split_requests(requests_for([10, 22, 1, 40, 3, 0], [0] * ROWS), config)
    assert [[(chunk.request_id, chunk.num_query_tokens) for chunk in batch] for batch in batches] == [
        [("0", 10), ("1", 22)],
        [("2", 1)],
        [("3", 32)],
        [("3", 8), ("4", 3), ("5", 0)],
    ]


def test_what_can_never_fit_is_refused_before_anything_runs() -> None:
    config = config_of(Combine.ALL_TO_ALL, 1000)
    wrapper, requests = UnifiedBatchWrapper(config), requests_for([1, 3, 0, 0, 0, 0], [9] * ROWS)
    needed = step_bytes(config, 1, 1, has_context=True)
    assert needed > 1000
    pages, arrays = poisoned_pages(config), [x[0] for x in Steps.start(config).arrays(0, 4)]
    with pytest.raises(
        ConfigError, match=f"got 1000 bytes, want at least {needed} for a batch of request '0' with 1 of its"
    ):
        wrapper.process_batch(requests, pages, 0, *arrays)
    assert not pages.k_pages.is_deleted()
    assert wrapper.get_stats().num_plans == 0
    with pytest.raises(DuplicateRequestError, match="'1' twice"):
        split_requests([requests[1], requests[1]], config)


def test_split_batches_give_what_one_batch_gives() -> None:
    free = config_of(Combine.REDUCE_SCATTER, row_buckets=(4,), token_buckets=(32,))
    budget = step_bytes(free, 4, 32, has_context=True)
    config = config_of(Combine.REDUCE_SCATTER, budget, row_buckets=(4,), token_buckets=(32,))
    wrapper, steps = UnifiedBatchWrapper(config), Steps.start(config)
    steps.process(wrapper, [31, 0, 1, 45, 2, 9], seed=1)
    assert wrapper.get_stats().num_plans == 2 * 3  # on each layer 31, 0, 1 | 32 | 13, 2, 9
    steps.process(wrapper, [1, 40, 1, 3, 0, 20], seed=2)
    steps.process(wrapper, [0] * ROWS)
    plans = wrapper.plan(steps.requests([2, 1, 1, 0, 30, 1]))
    arrays = steps.arrays(3, 40)  # more than there are tokens
    steps.compare(
        lambda layer, *parts: cut(wrapper.run(plans, steps.pages, layer, *parts)), [2, 1, 1, 0, 30, 1], arrays
    )
    assert wrapper.get_stats().num_compilations == 3  # without context, with, and one token each


def cut(output: Any) -> Any:
    assert np.isneginf(output.lse[35:]).all()
    assert (np.asarray(output.out[35:]) == 0).all()
    return output
