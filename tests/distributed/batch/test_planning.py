"""What a plan holds, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

from pyagent_kv_jax import KVPages
from pyagent_kv_jax.distributed import CacheSharding, Combine
from pyagent_kv_jax.distributed.batch import (
    BatchDCPDecodeWrapper,
    BatchDCPPrefillWrapper,
    BatchMetadata,
    BatchPhase,
    BatchRequest,
    DCPPlanConfig,
    create_decode_wrapper,
    create_prefill_wrapper,
    create_unified_wrapper,
    step_bytes,
)
from pyagent_kv_jax.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheError,
    RequestTooLongError,
    ShapeMismatchError,
    TooManyRequestsError,
)
from tests.distributed.attention_on_mesh import DIM, LAYERS
from tests.distributed.batch.steps_on_mesh import BLOCKS, Steps, plan_config, poisoned_pages
from tests.distributed.meshes import cpu_mesh

SHARDING = CacheSharding(cpu_mesh(dcp=2, tp=2), "dcp", "tp", 4, Combine.ALL_TO_ALL)
CONFIG = plan_config(SHARDING, 8, 2, slots=8, row_buckets=(2, 4), token_buckets=(16, 48), cache=[("max_model_len", 96)])
ONE = BatchRequest("a", [3, 1], 5, 20)


def test_a_batch_knows_its_phase() -> None:
    prompt, token, idle = BatchRequest("p", [0], 3), BatchRequest("t", [1], 1, 4), BatchRequest("i", [], 0)
    kinds = {
        BatchPhase.PREFILL: [prompt, idle],
        BatchPhase.DECODE: [token, idle],
        BatchPhase.MIXED: [prompt, token],
    }
    for phase, requests in kinds.items():
        batch = BatchMetadata.from_requests(requests, CONFIG.cache)
        assert batch.phase is phase
        assert (batch.is_prefill, batch.is_decode) == (phase is BatchPhase.PREFILL, phase is BatchPhase.DECODE)
        assert jax.tree.map(np.copy, batch).phase is phase  # a pytree


def test_a_plan_by_hand() -> None:
    requests = [BatchRequest("a", [3, 1], 5, 14), BatchRequest("b", [7], 2), BatchRequest("c", [2, 9], 0, 17)]
    plan = BatchDCPPrefillWrapper(CONFIG).plan(requests)
    assert (plan.num_rows, plan.num_tokens, plan.phase, plan.has_context) == (4, 16, BatchPhase.PREFILL, True)
    meta = jax.device_get(plan.meta)
    chex.assert_type([meta.block_tables, meta.slot_mapping, meta.positions, meta.kv_lens], np.int32)
    np.testing.assert_array_equal(meta.kv_lens, [19, 2, 0, 0])
    np.testing.assert_array_equal(meta.query_start_loc, [0, 5, 7, 7, 7])
    np.testing.assert_array_equal(meta.positions, [14, 15, 16, 17, 18, 0, 1] + [0] * 9)
    np.testing.assert_array_equal(meta.slot_mapping, [62, 63, 16, 17, 18, 112, 113] + [-1] * 9)
    np.testing.assert_array_equal(meta.block_tables[:3, :2], [[3, 1], [7, -1], [2, 9]])
    assert (meta.block_tables[3] == -1).all()
    assert meta.block_tables.shape == (4, 96 // 16)


def test_tokens_without_context_stand_in_pages_of_their_own() -> None:
    requests = [BatchRequest("a", [3], 9), BatchRequest("b", [], 0), BatchRequest("c", [5], 2)]
    plan = BatchDCPPrefillWrapper(CONFIG).plan(requests)
    own = jax.device_get(plan.own_tokens)
    np.testing.assert_array_equal(own.block_tables, [[0, 1], [-1, -1], [2, -1], [-1, -1]])  # of 8 slots each
    np.testing.assert_array_equal(own.slot_mapping[:12], [*range(9), 16, 17, -1])
    np.testing.assert_array_equal(own.kv_lens, [9, 0, 2, 0])


BAD_BATCHES: dict[str, tuple[list[BatchRequest], type[KVCacheError], str]] = {
    "none": ([], InvalidArgumentError, "got none"),
    "twice": ([ONE, dataclasses.replace(ONE, block_ids=[4, 5])], DuplicateRequestError, "'a' twice"),
    "blocks missing": ([BatchRequest("a", [3, 1], 5, 28)], InvalidArgumentError, "got 2 blocks, want 3 for 33 tokens"),
    "too long": ([BatchRequest("a", range(7), 1, 96)], RequestTooLongError, "got 97 tokens, want at most 96"),
    "no such block": ([BatchRequest("a", [BLOCKS], 1)], InvalidBlockError, f"got block {BLOCKS}, want ids below"),
    "wide": ([BatchRequest("a", range(7), 1)], InvalidBlockError, "got 7 blocks, want at most 6"),
    "written twice": (
        [ONE, BatchRequest("b", [1], 1)],
        InvalidBlockError,
        "block 1: got request 1 .* and request 0 that has",
    ),
    "written and read": ([ONE, BatchRequest("b", [1, 0], 1, 16)], InvalidBlockError, "block 1: .*want a copy"),
    "rows": ([BatchRequest(f"{i}", [i], 1) for i in range(5)], TooManyRequestsError, "got 5 requests, want at most 4"),
    "tokens": ([BatchRequest("a", range(4), 49)], InvalidArgumentError, "got 49 tokens, want at most 48"),
    "phase": ([BatchRequest("a", [0], 1, 1, BatchPhase.DECODE)], InvalidArgumentError, "phase decode, want prefill"),
}


@pytest.mark.parametrize("case", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_refused(case: tuple[list[BatchRequest], type[KVCacheError], str]) -> None:
    requests, error, message = case
    wrapper = BatchDCPPrefillWrapper(CONFIG)
    with pytest.raises(error, match=message):
        wrapper.plan(requests)
    assert wrapper.get_stats().num_plans == 0


def test_blocks_that_nobody_writes_may_be_shared() -> None:
    BatchDCPPrefillWrapper(CONFIG).plan([ONE, BatchRequest("b", [3, 2], 1, 16)])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"request_id": ""}, InvalidArgumentError, "request_id: got ''"),
        ({"num_query_tokens": -1}, InvalidArgumentError, "num_query_tokens: got -1"),
        ({"num_context_tokens": 1.5}, InvalidArgumentError, "num_context_tokens: got 1.5"),
        ({"phase": BatchPhase.MIXED}, InvalidArgumentError, "want 'prefill', 'decode' or None"),
        ({"block_ids": [0, -1]}, InvalidBlockError, "got -1, want ids from 0"),
        ({"block_ids": [4, 2, 4]}, InvalidBlockError, "got 4 twice"),
        ({"block_ids": [[1]]}, ShapeMismatchError, r"block_ids: got int64\[1, 1\]"),
    ],
)
def test_bad_requests_are_refused(fields: dict[str, Any], error: type[KVCacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(ONE, **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_axis": "cp"}, "context_axis: got 'cp', want one of the mesh's axes"),
        ({"num_q_heads": 9}, "num_q_heads: got 9, want a positive multiple of the 2 KV heads"),
        ({"num_q_heads": 6, "combine": "all_to_all"}, "q heads: got 6, want a multiple of 4"),
        ({"interleave": 3}, "interleave: got 3"),
        ({"combine": "gather"}, "combine: got 'gather', want one of"),
        ({"strategy": "star"}, "strategy: got 'star', want one of"),
        ({"row_buckets": (4, 2)}, r"row_buckets: got \(4, 2\), want positive integers that ascend"),
        ({"token_buckets": (2,), "row_buckets": (4,)}, "token_buckets: got at most 2 tokens for 4 rows"),
        ({"memory_budget": 0}, "memory_budget: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"dtype": "double"}, "dtype: got 'double', want one of"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"context_axis": "dcp", "tensor_axis": "tp", "num_q_heads": 8, **options}
    for create in (create_prefill_wrapper, create_decode_wrapper, create_unified_wrapper):
        with pytest.raises(ConfigError, match=message):
            create(CONFIG.cache, SHARDING.mesh, **given)


def test_wrappers_are_made_in_one_line() -> None:
    options: dict[str, Any] = {"context_axis": "dcp", "tensor_axis": "tp", "interleave": 4, "combine": "all_to_all"}
    for create in (create_prefill_wrapper, create_decode_wrapper, create_unified_wrapper):
        wrapper = create(CONFIG.cache, SHARDING.mesh, 8, **options, row_buckets=(2, 4), token_buckets=(16, 48))
        assert wrapper.config == CONFIG
    assert DCPPlanConfig(CONFIG.cache, SHARDING, 8).token_buckets == (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def test_runs_of_what_was_not_planned_are_refused() -> None:
    wrapper, pages, taken = BatchDCPPrefillWrapper(CONFIG), poisoned_pages(CONFIG), poisoned_pages(CONFIG)
    taken.k_pages.delete()
    plan = wrapper.plan([ONE])
    q, k, v = (x[0] for x in Steps.start(CONFIG).arrays(0, 16))
    other = dataclasses.replace(CONFIG, row_buckets=(4,))
    elsewhere = dataclasses.replace(SHARDING, interleave=1)
    bad: list[tuple[tuple[Any, ...], dict[str, Any], type[KVCacheError], str]] = [
        (
            (plan, pages, 0, q[:15], k, v),
            {},
            ShapeMismatchError,
            r"q: got float32\[15, 8, 8\], want float32\[16, 8, 8\]",
        ),
        (
            (plan, pages, 0, q, k[:, :1], v),
            {},
            ShapeMismatchError,
            r"k: got float32\[16, 1, 8\], want float32\[16, 2, 8",
        ),
        ((plan, pages, 0, q, k, v.astype(np.float16)), {}, ShapeMismatchError, r"v: got float16.*want float32\[16, 2"),
        ((BatchDCPPrefillWrapper(other).plan([ONE]), pages, 0, q, k, v), {}, ConfigError, "plan: got one of"),
        ((plan, dataclasses.replace(pages, sharding=elsewhere), 0, q, k, v), {}, ConfigError, "pages: got sharding"),
        ((plan, KVPages.create(CONFIG.cache), 0, q, k, v), {}, ConfigError, "pages: got KVPages, want ShardedKVPages"),
        ((plan, taken, 0, q, k, v), {}, InvalidArgumentError, "pages: got some that another call was given"),
        ((plan, pages, 0, q.tolist(), k, v), {}, ShapeMismatchError, r"q: got list\[16, 8, 8\]"),
        ((plan, pages, LAYERS, q, k, v), {}, InvalidArgumentError, f"layer: got {LAYERS}, want an integer below"),
        ((plan, pages, 0, q, k, v), {"window": 3}, InvalidArgumentError, r"options: got \['window'\]"),
        ((plan, pages, 0, q, k, v), {"sinks": np.ones(2)}, ShapeMismatchError, r"sinks: got shape \(2,\), want \(8,\)"),
        ((plan, pages, 0, q, k, v), {"sliding_window": 0}, InvalidArgumentError, "sliding_window: got 0"),
    ]
    for arguments, options, error, message in bad:
        with pytest.raises(error, match=message):
            wrapper.run(*arguments, **options)
    with pytest.raises(ShapeMismatchError, match=r"q: got float32\[4, 8, 8\], want float32\[at least 5, 8, 8\]"):
        wrapper.process_batch([ONE], pages, 0, q[:4], k[:4], v[:4])
    with pytest.raises(ShapeMismatchError, match=r"k: got float32\[15, 2, 8\].*as many as q"):
        wrapper.process_batch([ONE], pages, 0, q, k[:15], v)
    assert wrapper.get_stats().num_runs == 0
    assert not pages.k_pages.is_deleted()


def test_bytes_of_a_step_by_hand() -> None:
    rows, tokens, heads, width = 4, 48, 8 // 2, 96 // 16
    common = 4 * (rows * (width + 3) + 2 * tokens) + tokens * (2 * (2 * DIM * 4 + 4) + 2 * DIM * 4)
    states, kernel = tokens * heads, 2 * DIM * 4 + 4
    shares = states * (DIM * 4 + 4)
    forms = {
        Combine.ALL_TO_ALL: common + shares + states * (DIM * 4 + kernel),
        Combine.REDUCE_SCATTER: common + shares + states * (DIM * 4 + kernel),
        # a rank has all heads of its tensor rank: two more of q, out and LSE; sent and received outweigh the kernel's
        Combine.ALL_REDUCE: common + tokens * 2 * (2 * DIM * 4 + 4) + shares + 2 * shares,
    }
    for combine, want in forms.items():
        config = dataclasses.replace(CONFIG, sharding=dataclasses.replace(SHARDING, combine=combine))
        assert step_bytes(config, rows, tokens, has_context=True) == want, combine
    scratch = (tokens // 8 + rows) * 1 * 8 * 2 * DIM * 4 + 4 * (rows * tokens // 8 + 2 * tokens)
    assert step_bytes(CONFIG, rows, tokens, has_context=False) == common + tokens * 2 * kernel + scratch


def test_a_batch_over_the_memory_budget_is_refused() -> None:
    prompt = [BatchRequest("a", [3], 9)]
    # Decode always takes the way over the context ranks, and is held to what that takes.
    for wrapper, has_context in ((BatchDCPPrefillWrapper, False), (BatchDCPDecodeWrapper, True)):
        needed = step_bytes(CONFIG, 2, 16, has_context=has_context)
        wrapper(dataclasses.replace(CONFIG, memory_budget=needed)).plan(prompt)
        with pytest.raises(InvalidArgumentError, match=f"take {needed} bytes on a device, want at most {needed - 1}"):
            wrapper(dataclasses.replace(CONFIG, memory_budget=needed - 1)).plan(prompt)


def test_what_is_ready_to_be_handed_on() -> None:
    wrapper = BatchDCPPrefillWrapper(CONFIG)
    steps = Steps.start(CONFIG)
    requests = steps.requests([20, 0, 5, 16, 0, 0])[:4]
    plan = wrapper.plan(requests)
    arrays = [x[0] for x in steps.arrays(0, plan.num_tokens)]
    pages = wrapper.run(plan, steps.pages, 0, *arrays).pages
    with pytest.raises(InvalidArgumentError, match=r"has not run on layers \[1\], want all 2"):
        wrapper.ready_blocks(plan)
    wrapper.run(plan, pages, 1, *arrays)
    ready = wrapper.ready_blocks(plan)
    assert [(one.request_id, one.num_complete, one.num_tokens) for one in ready] == [
        ("0", 1, 20),
        ("1", 0, 0),
        ("2", 0, 5),
        ("3", 1, 16),
    ]
    for request, one, count in zip(requests, ready, [2, 0, 1, 1], strict=True):
        np.testing.assert_array_equal(one.block_ids, request.block_ids[:count])
    with pytest.raises(InvalidArgumentError, match="did not make"):
        BatchDCPPrefillWrapper(CONFIG).ready_blocks(plan)


def test_decode_goes_on_while_there_are_blocks() -> None:
    wrapper = BatchDCPDecodeWrapper(CONFIG)
    plan = wrapper.plan([BatchRequest("a", [3, 1], 1, 14), BatchRequest("b", [7, 2], 1, 28), BatchRequest("c", [], 0)])
    assert wrapper.num_steps_ahead(plan) == 3
    later = wrapper.advance(wrapper.advance(plan), 2)
    np.testing.assert_array_equal(later.meta.kv_lens, plan.meta.kv_lens + np.array([3, 3, 0, 0]))
    np.testing.assert_array_equal(later.meta.slot_mapping[:4], [16, 17, 2 * 16 + 14, 2 * 16 + 15])
    with pytest.raises(InvalidArgumentError, match="got 1, want at most 0, for which the requests have blocks"):
        wrapper.advance(later)
    shared = wrapper.plan([BatchRequest("a", [3, 1], 1, 14), BatchRequest("b", [7, 1], 1, 2)])
    with pytest.raises(InvalidBlockError, match="block 1"):
        wrapper.advance(wrapper.advance(shared), 14)
    with pytest.raises(ConfigError, match="plan: got one of"):
        BatchDCPDecodeWrapper(dataclasses.replace(CONFIG, row_buckets=(4,))).advance(plan)
    full = wrapper.plan([BatchRequest("a", range(6), 1, 95)])
    with pytest.raises(RequestTooLongError, match="got 1 after 96, want at most 96"):
        wrapper.advance(full)
