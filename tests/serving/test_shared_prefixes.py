"""What requests share: prefixes over steps and calls, and prompts over their samples; and what must not be shared."""

import dataclasses

import jax
import numpy as np
import pytest
from serving_models import answers_of, gemma_model, separate, small_model

from pyagent_kv_jax import KVCacheManager, ManagerOptions
from pyagent_kv_jax.errors import KVCacheError, RequestTooLongError
from pyagent_kv_jax.serving import DenseCacheManager, Engine, EngineConfig, SamplingParams, generate, serve


def paged(num_blocks=96, options=None, **sizes):
    config = small_model().config.kv_cache_config(
        **{"num_blocks": num_blocks, "block_size": 4, "max_num_reqs": 8, **sizes}
    )
    return KVCacheManager(config, options or ManagerOptions())


SMALL = EngineConfig(8, 32, row_buckets=(8,), token_buckets=(32,))


@pytest.fixture(scope="module")
def small_engine():
    engine = Engine(small_model(), paged(), SMALL)
    engine.warm_up()
    return engine


def computed_in(engine, action):
    """Prompt tokens computed meanwhile."""
    before = engine.scheduler.stats.num_computed_prompt_tokens
    action()
    return engine.scheduler.stats.num_computed_prompt_tokens - before


def test_a_second_generation_over_one_backend_computes_less():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 96, size).tolist() for size in (30, 17, 41)]
    backend, sampling = paged(), SamplingParams(max_tokens=6, ignore_eos=True)
    first, second = (
        generate(small_model(), prompts, sampling=sampling, backend=backend, max_num_seqs=8, token_budget=32)
        for _ in range(2)
    )
    assert [r.token_ids for r in second] == [r.token_ids for r in first]
    hits = sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)  # whole blocks, and never the last token
    assert backend.stats().hit_rate == hits / (2 * sum(map(len, prompts)))


def test_answers_are_cached_for_the_next_turn(small_engine):
    prompt = [9, 8, 7, 6, 5]
    sampling = SamplingParams(max_tokens=14, ignore_eos=True)
    answer = serve(small_engine, [prompt], sampling)[0].token_ids
    answers = []
    computed = computed_in(
        small_engine, lambda: answers.extend(serve(small_engine, [[*prompt, *answer, 1, 2]], sampling))
    )
    assert computed == 5 + 14 + 2 - 16  # the last token of the answer was never computed
    small_engine.backend.reset_prefix_cache()
    assert serve(small_engine, [[*prompt, *answer, 1, 2]], sampling)[0].token_ids == answers[0].token_ids


@pytest.mark.parametrize("when", ["before the device", "after the pages were donated", "the results are lost", "NaN"])
def test_a_step_that_breaks_off_leaves_nothing_to_hit(small_engine, monkeypatch, when):
    """Its blocks were entered into the prefix cache when it was planned, and never written."""
    rng = np.random.default_rng(len(when))
    prompts = [rng.integers(0, 96, 40).tolist() for _ in range(3)]
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    engine, backend, dispatch, steps = small_engine, small_engine.backend, small_engine._dispatch, []
    want = serve(engine, prompts, sampling)
    backend.reset_prefix_cache()

    def broken(*arguments):
        steps.append(arguments)
        if len(steps) != 2:
            return dispatch(*arguments)
        if when == "after the pages were donated":
            jax.tree.map(lambda leaf: leaf.delete(), backend.pages)
        if when == "NaN":
            weights = engine._weights
            engine._weights = tuple(weight * np.nan for weight in weights)
            output = dispatch(*arguments)
            engine._weights = weights
            return output
        if when == "the results are lost":  # written, but who knows
            dispatch(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_dispatch", broken)
    with pytest.raises((KeyboardInterrupt, KVCacheError)):
        serve(engine, prompts, sampling)
    monkeypatch.undo()
    assert backend.get_num_free_blocks() == backend.config.pool_blocks
    assert backend.stats().num_cached_blocks == 0
    assert [r.token_ids for r in serve(engine, prompts, sampling)] == [r.token_ids for r in want]


def test_what_ends_between_steps_keeps_the_prefix_cache(small_engine):
    prompt = list(range(40))
    small_engine.backend.reset_prefix_cache()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(small_engine, [prompt], SamplingParams(max_tokens=4), on_token=interrupt)
    assert computed_in(small_engine, lambda: serve(small_engine, [prompt], SamplingParams(max_tokens=4))) == 4


# -- several answers to one prompt -----------------------------------------------------------------------------


def test_samples_are_those_of_requests_of_their_own(small_engine):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 96, size).tolist() for size in (1, 2, 9, 38, 40)]
    sampling = [
        SamplingParams(temperature=1.5, top_k=30, seed=40 + i, max_tokens=7, ignore_eos=True, n=1 + i) for i in range(5)
    ]
    seen = []
    copied = small_engine.backend.stats().num_copied_blocks
    together = serve(small_engine, prompts, sampling, on_token=lambda i, token: seen.append((i, token)))
    assert small_engine.backend.stats().num_copied_blocks > copied
    assert [len(result.other_samples) for result in together] == [0, 1, 2, 3, 4]
    alone = serve(small_engine, *separate(prompts, sampling))
    assert [r.token_ids for r in answers_of(together)] == [r.token_ids for r in alone]
    for i, result in enumerate(alone):  # prompt by prompt, and sample by sample
        assert [token for index, token in seen if index == i] == result.token_ids
    assert len({tuple(answer.token_ids) for answer in answers_of(together[3:4])}) == 4
    # The first one is that of a request for one.
    assert (
        together[3].token_ids == serve(small_engine, [prompts[3]], dataclasses.replace(sampling[3], n=1))[0].token_ids
    )


def test_a_prompt_is_computed_once_for_all_its_samples():
    engine = Engine(small_model(), paged(options=ManagerOptions(prefix_caching=False)), SMALL)
    params = SamplingParams(max_tokens=3, ignore_eos=True, n=6, temperature=1.0, seed=1)
    assert computed_in(engine, lambda: serve(engine, [[5] * 33], params)) == 32 + 6
    # The children that find no row, and requests behind them, come all the same.
    more = dataclasses.replace(params, n=20)
    results = serve(engine, [[5] * 33, [7]], [more, params])
    assert [len(r.other_samples) for r in results] == [19, 5]
    assert engine.backend.get_num_free_blocks() == 96


def test_samples_over_a_dense_cache_are_requests_of_their_own(small_engine):
    dense = DenseCacheManager.like(small_engine.backend.config, 8)
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=3, temperature=1.0, seed=11)
    got = serve(Engine(small_model(), dense, SMALL), [[3] * 20], params)
    assert [r.token_ids for r in answers_of(got)] == [
        r.token_ids for r in answers_of(serve(small_engine, [[3] * 20], params))
    ]


# -- layer groups ----------------------------------------------------------------------------------------------


def test_a_request_that_its_layer_groups_could_never_hold_is_refused_on_arrival():
    model, config = gemma_model()
    sizes = {"block_size": 8, "max_num_reqs": 2, "group_layers": True}
    # 160 tokens: 20 blocks of the group that keeps all; five groups keep a window and a step, 20 + 32 tokens.
    fitting = config.kv_cache_config(num_blocks=20 + 5 * 8, **sizes)
    assert fitting.most_blocks(160, 32) == 60
    too_small = dataclasses.replace(fitting, num_blocks=59)
    prompts, sampling = [[1] * 140], SamplingParams(max_tokens=21, ignore_eos=True)
    options = {"sampling": sampling, "max_num_seqs": 2, "token_budget": 32}
    with pytest.raises(RequestTooLongError, match=r"60 blocks, want at most 59 \(the pool\)"):
        generate(model, prompts, backend=KVCacheManager(too_small), **options)
    (result,) = generate(model, prompts, backend=KVCacheManager(fitting), **options)
    assert len(result.token_ids) == 21
