"""The demo in a small size, and the record and the picture it is made of."""

import numpy as np
import pytest
from matplotlib import image

from pyagent_kv_jax.cache import AttentionMetadata
from pyagent_kv_jax.manager.step_plan import StepPlan
from pyagent_kv_jax.serving.cache_record import CacheRecord
from pyagent_kv_jax.serving.demo import DemoSizes, demo_model_directory, demo_text, demo_traffic, run_demo
from pyagent_kv_jax.serving.prefix_demo import PrefixSizes, prefix_traffic
from pyagent_kv_jax.serving.request import Request
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.scheduler import Outcome, Schedule

SIZES = DemoSizes(
    num_prompts=10,
    prompt_tokens=(5, 40),
    output_tokens=(4, 12),
    max_model_len=128,
    dense_rows=2,
    token_budget=64,
    row_buckets=(10,),
    repeats=1,
    prefix=PrefixSizes(num_prompts=6, shared_tokens=70, own_tokens=(3, 9), output_tokens=4, repeats=2),
)


def test_demo_serves_alike_and_shows_it(tmp_path, capsys):
    report = run_demo(tmp_path / "pictures", SIZES)
    assert report.comparison.equal
    assert report.comparison.num_tokens == report.paged.num_generated == report.dense.num_generated
    assert report.paged.history.in_flight.mean() > 1.5 * report.dense.history.in_flight.mean()
    assert report.paged.history.waste < report.dense.history.waste
    dense_config, paged_config = report.dense.config, report.paged.config
    assert dense_config.num_slots == paged_config.num_slots  # equal memory
    assert report.picture == tmp_path / "pictures" / "kv_cache_blocks.png"
    assert image.imread(report.picture).shape[0] > 300
    without, cached = report.prefix.without, report.prefix.cached
    assert report.prefix.comparison.equal
    assert report.prefix.comparison.num_tokens == 6 * 4
    assert without.num_computed == sum(map(len, prefix_traffic(range(200), SIZES.prefix)))
    assert without.num_cached == 0
    # The first prompt's first 64 tokens come in one step; the others find its 4 full blocks.
    assert cached.num_cached == 5 * 64
    assert cached.num_computed == without.num_computed - 5 * 64
    printed = capsys.readouterr().out
    for word in (
        "bytes reserved",
        "bytes used",
        "waste",
        "in flight",
        "tokens/s",
        "compilations",
        "the same",
        "first token",
    ):
        assert word in printed


def test_full_demo_asks_for_what_the_goal_says():
    """48 prompts of very different lengths, mean total length of 200 tokens or more, rows of 2,048, blocks of 16."""
    from pyagent_kv_jax.models import load_tokenizer

    sizes = DemoSizes()
    with demo_model_directory() as directory:
        prompts, sampling = demo_traffic(load_tokenizer(directory).encode(demo_text()).ids, sizes)
    lengths = [len(prompt) for prompt in prompts]
    totals = [n + each.max_tokens for n, each in zip(lengths, sampling, strict=True)]
    assert (len(prompts), sizes.max_model_len, sizes.block_size) == (48, 2048, 16)
    assert np.mean(totals) >= 200
    assert max(totals) <= 2048
    assert max(lengths) > 50 * min(lengths)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 48


def test_record_plays_back_who_held_what():
    record = CacheRecord(num_blocks=4, block_size=4)
    a, b = (Request(name, np.ones(6, np.int32), SamplingParams()) for name in "ab")

    def step(requests, ok, tables, kv_lens, free=(), preempted=()):
        n = np.zeros(len(requests), np.int32)
        meta = AttentionMetadata(np.array(tables), np.array(kv_lens), None, n, n, np.array(ok))
        plan = StepPlan(tuple(r.request_id for r in requests), np.array(ok), n, meta, np.zeros(len(requests), np.int32))
        record.add(Schedule(requests, n.tolist(), list(free)), plan, Outcome([], [], [], list(preempted)))

    step([a], [True], [[2, 0, -1], [-1, -1, -1]], [6, 0])
    step([b, a], [True, False], [[3, -1, -1], [-1, -1, -1]], [1, 0])  # a sits out, and keeps what it has
    step([b], [True], [[3, -1, -1]], [2], free=["a"], preempted=[b])
    step([], [], np.zeros((0, 3), int), [])
    history = record.history(unit=2)
    assert history.owner.tolist() == [
        [0, 0, -1, -1, 0, 0, -1, -1],
        [0, 0, -1, -1, 0, 0, 1, 1],
        [-1, -1, -1, -1, -1, -1, 1, 1],
        [-1] * 8,
    ]
    assert history.used.tolist()[0] == [True, False, False, False, True, True, False, False]
    assert history.in_flight.tolist() == [1, 2, 1, 0]
    assert history.reserved_tokens.tolist() == [8, 12, 4, 0]
    assert history.used_tokens.tolist() == [6, 7, 2, 0]
    assert history.waste == pytest.approx(1 - 15 / 24)
