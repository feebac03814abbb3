"""``generate`` from end to end: real model, real cache, both kinds of cache, and everything that can interrupt it."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx
from serving_models import CONFIG, VOCAB, ragged_prompts, small_model

from pyagent_kv_jax.errors import (
    CallbackError,
    InvalidArgumentError,
    KVCacheError,
    OutOfBlocksError,
    RequestTooLongError,
)
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.serving import (
    DenseCacheManager,
    Engine,
    EngineConfig,
    SamplingParams,
    compare_tokens,
    generate,
    serve,
)
from pyagent_kv_jax.serving.sampling import SamplingArrays


def paged_manager(num_blocks=96, block_size=4, max_num_reqs=16):
    return KVCacheManager(
        CONFIG.kv_cache_config(num_blocks=num_blocks, block_size=block_size, max_num_reqs=max_num_reqs)
    )


def dense_manager(rows=16):
    return DenseCacheManager.like(CONFIG.kv_cache_config(num_blocks=1, max_num_reqs=rows), rows)


@pytest.fixture(scope="module")
def paged_engine():
    """One warm engine whose pool (96 blocks of 4) is too small for 16 requests at once."""
    engine = Engine(small_model(), paged_manager(), EngineConfig(16, 32, row_buckets=(4, 16)))
    engine.warm_up()
    return engine


@contextlib.contextmanager
def counted_compilations():
    """Counts everything XLA compiles in this process: steps, the manager's own calls, and strays."""
    counted = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(details.get("fun_name", duration))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def all_free(manager):
    return manager.get_num_free_blocks() == manager.config.pool_blocks


@pytest.fixture(scope="module")
def ragged():
    """64 requests, their greedy answers through the dense cache, and the margins."""
    prompts = ragged_prompts(64)
    sampling = [SamplingParams(max_tokens=5 + 11 * i % 41, ignore_eos=True) for i in range(64)]
    engine = Engine(small_model(), dense_manager(), EngineConfig(16, 32, row_buckets=(16,), with_margins=True))
    return prompts, sampling, serve(engine, prompts, sampling)


def test_64_ragged_requests_some_preempted_give_the_dense_tokens(paged_engine, ragged):
    prompts, sampling, dense = ragged
    before = paged_engine.num_compilations
    with counted_compilations() as compiled:
        paged = serve(paged_engine, prompts, sampling)
    assert compiled == []
    assert paged_engine.num_compilations == before

    def regenerate(known, max_tokens):
        return serve(paged_engine, known, [SamplingParams(max_tokens=n, ignore_eos=True) for n in max_tokens])

    comparison = compare_tokens(prompts, dense, paged, regenerate)
    print(comparison)
    assert comparison.equal, comparison
    assert sum(result.num_preemptions for result in paged) >= 3
    assert all(len(r.token_ids) == s.max_tokens for r, s in zip(paged, sampling, strict=True))
    assert all_free(paged_engine.backend)
    paged_engine.backend.check_invariants()


def test_nothing_compiles_after_warm_up_whatever_comes(paged_engine):
    rng = np.random.default_rng(5)
    paged_engine.backend.reset_prefix_cache()
    with counted_compilations() as compiled:
        for count in (1, 3, 7, 40):
            params = [
                SamplingParams(
                    temperature=float(rng.choice([0.0, 0.8])),
                    top_k=int(rng.integers(1, 200)) if rng.random() < 0.5 else None,
                    top_p=float(rng.uniform(0.5, 1.0)),
                    seed=i,
                    max_tokens=int(rng.integers(1, 12)),
                )
                for i in range(count)
            ]
            for _ in range(2):  # the second time, with hits
                serve(paged_engine, ragged_prompts(count, seed=count), params)
        with pytest.raises(CallbackError):
            serve(paged_engine, ragged_prompts(9), SamplingParams(max_tokens=9), on_token=lambda *_: 1 / 0)
    assert compiled == []
    assert paged_engine.backend.stats().hit_rate > 0.1
    assert all_free(paged_engine.backend)


def test_the_counter_of_compilations_can_count():
    with counted_compilations() as compiled:
        jax.jit(lambda x: x * 3.5)(np.ones(7))
    assert compiled


def test_a_request_alone_and_in_company_gives_the_same_sampled_tokens(paged_engine):
    prompts = ragged_prompts(12, seed=2)
    params = [SamplingParams(temperature=0.7, top_k=20, seed=100 + i, max_tokens=6) for i in range(12)]
    together = serve(paged_engine, prompts, params)
    for i in (0, 5, 11):
        assert serve(paged_engine, prompts[i : i + 1], params[i : i + 1])[0].token_ids == together[i].token_ids


def test_without_a_seed_each_request_draws_its_own(paged_engine):
    results = serve(paged_engine, [[1, 2, 3]] * 4, SamplingParams(temperature=3.0, max_tokens=12))
    assert len({tuple(result.token_ids) for result in results}) > 1


def test_tokens_stream_in_order(paged_engine, capsys):
    prompts, seen = ragged_prompts(10, seed=3), []
    params = SamplingParams(max_tokens=8)
    results = serve(paged_engine, prompts, params, on_token=lambda i, t: seen.append((i, t)), progress=True)
    assert "10/10" in capsys.readouterr().err
    for i, result in enumerate(results):
        assert [token for index, token in seen if index == i] == result.token_ids
    firsts = [next(at for at, (index, _) in enumerate(seen) if index == i) for i in range(10)]
    assert firsts == sorted(firsts)  # first come, first served


def test_a_stop_token_ends_the_answer_and_is_its_last(paged_engine):
    prompt = [3, 1, 4, 1, 5]
    free_run = serve(paged_engine, [prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert free_run.finish_reason == "length"
    stop = free_run.token_ids[9]
    params = SamplingParams(max_tokens=30, stop_token_ids=[stop], ignore_eos=True)
    stopped = serve(paged_engine, [prompt], params)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free_run.token_ids[: free_run.token_ids.index(stop) + 1]


def test_the_models_own_end_token_stops_unless_ignored():
    engine = Engine(small_model(), dense_manager(4), EngineConfig(4, 16, row_buckets=(4,)))
    wanted = serve(engine, [[7, 8, 9]], SamplingParams(max_tokens=6, ignore_eos=True))[0].token_ids
    engine._eos = frozenset([wanted[2]])
    ended = serve(engine, [[7, 8, 9]], SamplingParams(max_tokens=6))[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == wanted[: wanted.index(wanted[2]) + 1]
    assert serve(engine, [[7, 8, 9]], SamplingParams(max_tokens=6, ignore_eos=True))[0].token_ids == wanted


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()], ids=["raises", "interrupted"])
def test_an_interrupted_generation_gives_every_block_back(paged_engine, error):
    calls = []

    def on_token(index, token):
        calls.append(index)
        if len(calls) == 25:
            raise error

    wanted = CallbackError if isinstance(error, ValueError) else KeyboardInterrupt
    with pytest.raises(wanted) as raised:
        serve(paged_engine, ragged_prompts(20), SamplingParams(max_tokens=20), on_token=on_token)
    if wanted is CallbackError:
        assert raised.value.__cause__ is error
    assert len(calls) == 25
    assert all_free(paged_engine.backend)
    assert not paged_engine.has_unfinished
    again = serve(paged_engine, [[1, 2, 3]], SamplingParams(max_tokens=4))  # and it goes on working
    assert len(again[0].token_ids) == 4


@pytest.mark.parametrize("when", ["before the device", "after the pages were donated"])
def test_a_step_that_breaks_off_gives_every_block_back(paged_engine, monkeypatch, when):
    """The worst moment: the manager has admitted requests that the scheduler still takes for waiting."""
    dispatch, steps = paged_engine._dispatch, []

    def broken(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            if when != "before the device":
                jax.tree.map(lambda leaf: leaf.delete(), paged_engine.backend.pages)
            raise KeyboardInterrupt
        return dispatch(*arguments)

    monkeypatch.setattr(paged_engine, "_dispatch", broken)
    prompts = [[1 + i] * 20 for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        serve(paged_engine, prompts, SamplingParams(max_tokens=4))
    assert all_free(paged_engine.backend)
    paged_engine.backend.check_invariants()
    with counted_compilations() as compiled:
        assert len(serve(paged_engine, prompts, SamplingParams(max_tokens=4))) == 6
    assert compiled == []


def test_warm_up_leaves_the_cache_alone_even_a_full_one():
    manager = paged_manager()
    blocks = {f"other{size}": manager.allocate(f"other{size}", size) for size in (128, 124, 120, 12)}
    assert manager.get_num_free_blocks() == 0
    manager.pages = jax.tree.map(lambda leaf: leaf + 3.25, manager.pages)
    Engine(small_model(), manager, EngineConfig(16, 32, row_buckets=(4, 16))).warm_up()
    assert {name: manager.get_block_table(name) for name in blocks} == blocks
    assert all((np.asarray(leaf) == 3.25).all() for leaf in jax.tree.leaves(manager.pages))
    assert manager.stats().hit_rate == 0


def test_a_memory_pressure_callback_that_raises_ends_generation_cleanly():
    engine = Engine(small_model(), paged_manager(), EngineConfig(16, 32, row_buckets=(4, 16)))
    told = []

    def callback(pressure):
        told.append(pressure.num_blocks_needed)
        raise RuntimeError("no")

    engine.backend.on_memory_pressure(callback)
    with pytest.raises(CallbackError, match="memory-pressure callback"):
        serve(engine, [[1] * 30] * 16, SamplingParams(max_tokens=60, ignore_eos=True))
    assert told == [told[0]]
    assert all_free(engine.backend)


def test_nan_logits_are_an_error_not_a_token():
    graph, state = nnx.split(small_model())
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * np.nan, state))
    engine = Engine(model, paged_manager(), EngineConfig(16, 32, row_buckets=(4, 16)))
    with pytest.raises(KVCacheError, match="NaN logits for token 0"):
        serve(engine, [[1, 2, 3]], SamplingParams(max_tokens=8))
    assert all_free(engine.backend)


def test_requests_of_others_in_the_cache_are_left_alone(paged_engine):
    manager = paged_engine.backend
    others = {f"other{i}": manager.allocate(f"other{i}", 124) for i in range(3)}  # 31 blocks each, 3 are left
    try:
        assert len(serve(paged_engine, ragged_prompts(8, longest=4), SamplingParams(max_tokens=6))) == 8
        with pytest.raises(OutOfBlocksError, match="held elsewhere"):
            serve(paged_engine, [[1] * 20], SamplingParams(max_tokens=6))
        assert {name: manager.get_block_table(name) for name in others} == others
        assert manager.get_num_free_blocks() == 3
    finally:
        for name in others:
            manager.free(name)
    assert all_free(manager)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1] * 9, []], {}, InvalidArgumentError, "got 0 tokens"),
        ([[1, VOCAB]], {}, InvalidArgumentError, f"got token id {VOCAB}, want 0 to {VOCAB - 1}"),
        ([[1, -1]], {}, InvalidArgumentError, "got token id -1"),
        ([[1.5]], {}, InvalidArgumentError, "want a flat sequence of integer"),
        (["text"], {}, InvalidArgumentError, "want token ids"),
        ([[[1], [2, 3]]], {}, InvalidArgumentError, "want a flat sequence"),
        ([[1], [2] * 120], {"sampling": SamplingParams(max_tokens=10)}, RequestTooLongError, "one row"),
        ([[1], [2]], {"sampling": [SamplingParams()]}, InvalidArgumentError, "got 1 entries"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_computed(paged_engine, prompts, options, error, message):
    options = {"sampling": SamplingParams(max_tokens=8), **options}
    steps = paged_engine.scheduler.stats.num_steps
    with pytest.raises(error, match=message):
        serve(paged_engine, prompts, **options)
    assert paged_engine.scheduler.stats.num_steps == steps
    assert not paged_engine.has_unfinished
    assert all_free(paged_engine.backend)


def test_generate_makes_its_own_cache():
    prompts = ragged_prompts(5, seed=9)
    seen = []
    results = generate(
        small_model(),
        prompts,
        sampling=SamplingParams(max_tokens=4),
        max_num_seqs=16,
        token_budget=32,
        on_token=lambda i, t: seen.append(i),
    )
    assert [len(r.token_ids) for r in results] == [4] * 5
    assert len(seen) == 20
    assert generate(small_model(), []) == []
    with pytest.raises(InvalidArgumentError, match="want the one or the others"):
        generate(small_model(), prompts, backend=dense_manager(), cache_config=CONFIG.kv_cache_config(num_blocks=4))
    with pytest.raises(InvalidArgumentError, match="max_num_reqs"):
        generate(small_model(), prompts, backend=dense_manager(4), max_num_seqs=8)
    for wrong in ([1, 2, 3], "text", [[[1, 2], [3, 4]]]):
        with pytest.raises(InvalidArgumentError, match=r"want .*token ids"):
            generate(small_model(), wrong)
    with pytest.raises(InvalidArgumentError, match=r"of \['str'\], want one SamplingParams"):
        generate(small_model(), prompts, sampling={"max_tokens": 4})
    with pytest.raises(InvalidArgumentError, match="want a cache_config"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), prompts)


def test_no_more_requests_run_at_once_than_the_cache_given_has_rows():
    config = CONFIG.kv_cache_config(num_blocks=64, max_num_reqs=3, max_model_len=64)
    results = generate(
        small_model(), ragged_prompts(5, longest=9), sampling=SamplingParams(max_tokens=2), cache_config=config
    )
    assert [len(result.token_ids) for result in results] == [2] * 5


def test_pages_are_donated_and_written_in_place(paged_engine):
    """The compiled step aliases the whole cache and needs little beside it."""
    config = CONFIG.kv_cache_config(num_blocks=4096, block_size=16, max_num_reqs=4)
    engine = Engine(small_model(), KVCacheManager(config), EngineConfig(4, 16, row_buckets=(4,)))
    manager = engine.backend
    meta = manager.step([], [], num_rows=4).metadata.cut(4, 4)
    lowered = engine._step.run.lower(
        engine._weights,
        manager.pages,
        np.zeros(4, np.int32),
        meta,
        None,
        SamplingArrays.from_rows([], [], [], 4),
        False,
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= manager.pages.nbytes
    assert memory.temp_size_in_bytes < manager.pages.nbytes / 10
