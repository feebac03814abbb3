"""Mistakes that others have made, put in on purpose: each must turn the comparison red."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pyagent_kv_jax.cache import kv_pages
from pyagent_kv_jax.distributed import CacheSharding, Combine, sharded_kv_pages
from pyagent_kv_jax.distributed.batch import BatchDCPDecodeWrapper, BatchDCPPrefillWrapper, execution_plan, own_tokens
from tests.distributed.batch.steps_on_mesh import Steps, plan_config
from tests.distributed.meshes import cpu_mesh

Q_HEADS, KV_HEADS = 12, 2


@pytest.fixture(autouse=True)
def _traced_anew() -> Iterator[None]:
    jax.clear_caches()  # kernels are jitted: what others traced hides the mistake
    yield
    jax.clear_caches()


def decode_two_steps(**options: Any) -> None:
    config = plan_config(
        CacheSharding(cpu_mesh(dcp=4), "dcp", None, 4, Combine.ALL_TO_ALL), Q_HEADS, KV_HEADS, token_buckets=(40,)
    )
    steps, wrapper = Steps.start(config), BatchDCPDecodeWrapper(config)
    for seed, lens in enumerate(([9, 3, 1, 0, 20, 5], [1, 6, 2, 1, 3, 9])):
        steps.run(wrapper, wrapper.plan(steps.requests(lens)), seed, **options)


def prefill() -> None:
    config = plan_config(CacheSharding(cpu_mesh(dcp=4), "dcp"), Q_HEADS, KV_HEADS, token_buckets=(40,))
    steps, wrapper = Steps.start(config), BatchDCPPrefillWrapper(config)
    steps.run(wrapper, wrapper.plan(steps.requests([9, 3, 1, 0, 20, 5])))


def with_interleave(function: Any, change: int) -> Any:
    def wrong(slots: Any, block_size: int, share: Any) -> Any:
        return function(slots, block_size, share._replace(interleave=share.interleave + change))

    return wrong


def test_without_a_mistake_all_is_green() -> None:
    decode_two_steps(sliding_window=3)
    prefill()


def test_interleave_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kv_pages, sharded_kv_pages):
        monkeypatch.setattr(module, "local_slots", with_interleave(module.local_slots, 1))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        decode_two_steps()


def test_a_global_length_where_a_local_one_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextParallel, "local_length", lambda self, length: length)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        decode_two_steps(sliding_window=3)


def test_a_local_position_where_a_global_one_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextParallel, "position", lambda self, local: local)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        decode_two_steps()


def test_lengths_of_a_plan_divided_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    against_cache = execution_plan._against_cache

    def wrong(config: Any, batch: Any, layout: Any) -> Any:
        meta = against_cache(config, batch, layout)
        return dataclasses.replace(meta, kv_lens=-(-meta.kv_lens // 4))

    monkeypatch.setattr(execution_plan, "_against_cache", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        decode_two_steps()


def test_kv_heads_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = own_tokens.kv_heads_read
    monkeypatch.setattr(own_tokens, "kv_heads_read", lambda first, count, group: heads(0, count, group))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        prefill()
