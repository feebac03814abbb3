"""Block tables that stay on the device between steps: the same tokens, fewer bytes sent."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.config import DeviceType
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM
from pyagent_kv_jax.serving import SamplingParams
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import serve
from pyagent_kv_jax.serving.tables_on_device import TablesOnDevice
from tests.serving.serving_models import gemma_model, ragged_prompts, small_model


def engine_of(model: LlamaForCausalLM, on_device: bool | None) -> Engine:
    sizes: LlamaConfig = model.config
    cache = sizes.kv_cache_config(group_layers=True, num_blocks=256, max_num_reqs=8, max_model_len=128, block_size=4)
    return Engine(model, KVCacheManager(cache), EngineConfig(8, 32, row_buckets=(4,), tables_on_device=on_device))


def test_the_same_tokens_for_fewer_bytes() -> None:
    """Over layer groups, whose tables lie one after another in the buffer."""
    prompts, sampling = ragged_prompts(10, longest=40), SamplingParams(max_tokens=8, ignore_eos=True)
    model, _ = gemma_model()
    plain, ours = engine_of(model, False), engine_of(model, True)
    sizes = []
    ours.on_step = lambda schedule, plan, outcome: sizes.append(np.asarray(plan.metadata.block_tables).nbytes)
    want, got = (serve(engine, prompts, sampling) for engine in (plain, ours))
    assert [result.token_ids for result in got] == [result.token_ids for result in want]
    assert plain.tables is None
    assert ours.tables is not None
    assert 0 < ours.tables.bytes_sent < 0.7 * sum(sizes)


def test_off_where_the_cache_is_in_host_memory() -> None:
    engine = engine_of(small_model(), None)
    assert engine.backend.config.device_type is not DeviceType.CPU or engine.tables is None


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 6)])
def test_any_change_arrives(shape: tuple[int, ...]) -> None:
    rng, tables, sent = np.random.default_rng(0), np.full(shape, -1, np.int32), TablesOnDevice()
    sent.warm_up(tables)
    for _ in range(30):
        tables = tables.copy()
        tables[tuple(rng.integers(0, n) for n in shape)] = rng.integers(0, 1000)
        np.testing.assert_array_equal(sent.send(tables), tables.reshape(-1, shape[-1]))
    before = sent.bytes_sent
    sent.send(tables)
    assert sent.bytes_sent == before
