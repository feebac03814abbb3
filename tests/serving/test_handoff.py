"""A prefill and a decode instance in one process: equal tokens, nothing sent twice, everything given back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from pyagent_kv_jax import (
    ConfigError,
    DType,
    InvalidArgumentError,
    KVCacheManager,
    ManagerOptions,
    RequestTooLongError,
)
from pyagent_kv_jax.config import group_layers
from pyagent_kv_jax.distributed import CacheSharding
from pyagent_kv_jax.errors import TransferError
from pyagent_kv_jax.models import LlamaForCausalLM
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.generate import serve
from pyagent_kv_jax.serving.handoff import DecodeInstance, LoadOptions, LocalLink, model_fingerprint
from pyagent_kv_jax.serving.sampling import SamplingParams
from tests.serving.handoff_process import SIZES, shared_engine
from tests.serving.serving_models import CONFIG as MODEL_CONFIG
from tests.serving.serving_models import VOCAB, enlarged, small_model

ANSWER = SamplingParams(max_tokens=8, ignore_eos=True)
NO_OPTIONS = ManagerOptions()
OPTIONS = LoadOptions(seconds=60.0, chunk_bytes=4096, window=2)


def cache_config(num_blocks=48, **overrides):
    return MODEL_CONFIG.kv_cache_config(
        **{"num_blocks": num_blocks, "block_size": 8, "max_num_reqs": 8, "max_model_len": 96, **overrides}
    )


def make_engine(config=None, sharding=None, model=None, options=None, side="decode"):
    if config is None and sharding is None and model is None and options is None:
        return shared_engine(side)
    return new_engine(config, sharding, model, options or NO_OPTIONS)


def new_engine(config=None, sharding=None, model=None, options=NO_OPTIONS):
    manager = KVCacheManager(config or cache_config(), options, sharding=sharding)
    return Engine(model or small_model(), manager, SIZES)


def pair(prefill=None, decode=None, name="small", lease_seconds=60.0, **options):
    link = LocalLink(prefill or make_engine(side="prefill"), name, lease_seconds=lease_seconds)
    options = {"options": OPTIONS, **options}
    return DecodeInstance(decode or make_engine(side="decode"), link, name, **options)


def prompts_of(*lengths, seed=0, shared=0):
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB - 1, shared).tolist()
    return [common + rng.integers(0, VOCAB - 1, n).tolist() for n in lengths]


def single(prompts, engine=None, sampling=ANSWER):
    """Of an engine that computes all of it itself."""
    engine = engine or make_engine()
    engine.backend.reset_prefix_cache()
    return [result.token_ids for result in serve(engine, prompts, sampling)]


def assert_all_given_back(decode):
    for manager in (decode.manager, decode.link.instance.manager):
        manager.check_invariants()
        assert manager.holds() == []
        assert manager.get_num_free_blocks() == manager.config.pool_blocks
    assert len(decode.link.instance.leases) == decode.link.instance.num_staged == 0
    assert len(decode.link._stage) == 0


def test_tokens_equal_those_of_one_instance():
    prompts = prompts_of(3, 8, 9, 40, 61, 17)
    decode = pair()
    done = decode.generate(prompts, ANSWER)
    assert [each.num_fetched for each in done] == [0, 0, 1, 4, 7, 2]  # full blocks, the last token's left out
    assert all(each.transfer_error is None for each in done)
    stats = decode.engine.scheduler.stats
    assert stats.num_computed_prompt_tokens == 3 + 8 + 1 + 8 + 5 + 1  # only what no block held
    assert_all_given_back(decode)
    assert [each.token_ids for each in done] == single(prompts)


def test_what_is_here_is_not_sent():
    first, second = prompts_of(3, 20, shared=24)
    decode = pair()
    decode.generate([first], ANSWER)
    (done,) = decode.generate([second], ANSWER)
    assert (done.num_present, done.num_fetched) == (3, 2)
    assert decode.link.instance.stats.num_blocks_read == 3 + 2
    (again,) = decode.generate([second], ANSWER)
    assert (again.num_present, again.num_fetched) == (5, 0)
    assert again.token_ids == done.token_ids
    assert decode.link.instance.stats.num_cached == 1  # nor computed twice
    assert_all_given_back(decode)
    assert done.token_ids == single([second])[0]


def on_mesh(context, tensor, first=0, interleave=1):
    devices = jax.devices("cpu")[first : first + context * tensor]
    mesh = jax.make_mesh((context, tensor), ("c", "t"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return CacheSharding(mesh, "c", "t", interleave)


def test_between_two_meshes():
    prompts = prompts_of(30, 13)
    sampling = dataclasses.replace(ANSWER, max_tokens=4)
    decode = pair(make_engine(sharding=on_mesh(2, 1)), make_engine(sharding=on_mesh(1, 2, first=4)))
    done = decode.generate(prompts, sampling)
    assert [each.token_ids for each in done] == single(prompts, sampling=sampling)
    assert [each.num_fetched for each in done] == [3, 1]
    assert_all_given_back(decode)


def test_layer_groups_send_what_the_next_token_sees():
    config = dataclasses.replace(MODEL_CONFIG, layer_windows=(20, None))
    model = enlarged(LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    sizes = config.kv_cache_config(
        num_blocks=48, block_size=8, max_num_reqs=8, max_model_len=96, layer_groups=group_layers((20, None))
    )
    (prompt,) = prompts_of(70)
    decode = pair(make_engine(sizes, model=model), make_engine(sizes, model=model))
    (done,) = decode.generate([prompt], ANSWER)
    # Position 64 sees tokens 45 to 64: three blocks of the windowed group, all eight of the other.
    assert done.num_fetched == 3 + 8
    assert decode.engine.scheduler.stats.num_computed_prompt_tokens == 6
    assert_all_given_back(decode)
    assert done.token_ids == single([prompt], decode.engine)[0]


def test_quantised_blocks():
    prompts = prompts_of(30)
    config = cache_config(dtype=DType.FP8)

    def scaled(factor):
        engine = make_engine(config)
        scale = np.full((config.num_layers, config.num_heads), factor, np.float32)
        engine.backend.pages = engine.backend.pages.with_scales(scale, scale)
        return engine

    decode = pair(scaled(0.05), scaled(0.05))
    answers = [each.token_ids for each in decode.generate(prompts, ANSWER)]
    assert answers == single(prompts, decode.engine)
    with pytest.raises(TransferError, match="scales"):
        pair(scaled(0.05), scaled(0.04))


@pytest.mark.parametrize(
    ("name", "config", "wanted"),
    [
        ("large", {}, "model: got 'small', want 'large'"),
        ("small", {"block_size": 16}, "geometry"),
        ("small", {"dtype": DType.BFLOAT16}, "geometry"),
    ],
)
def test_another_instance_is_refused(name, config, wanted):
    link = LocalLink(make_engine(), "small")
    with pytest.raises(TransferError, match=wanted):
        DecodeInstance(make_engine(cache_config(**config)), link, name)


def test_another_hash_algorithm_or_version_is_refused():
    link = LocalLink(make_engine(), "small")
    with pytest.raises(TransferError, match="hash_algorithm: got 'sha256', want 'xxh3_128'"):
        DecodeInstance(make_engine(options=ManagerOptions(hash_algorithm="xxh3_128")), link, "small")
    link.instance.identity = dataclasses.replace(link.instance.identity, library="0.0", protocol=0)
    with pytest.raises(TransferError, match=r"protocol: got '0', want 1; library: got '0.0', want '0.1'"):
        DecodeInstance(make_engine(), link, "small")


def test_the_fingerprint_is_of_the_weights():
    one, same, other = (LlamaForCausalLM(MODEL_CONFIG, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    changed = dataclasses.replace(MODEL_CONFIG, rms_norm_eps=1e-3)
    assert model_fingerprint(LlamaForCausalLM(changed, rngs=nnx.Rngs(0))) != model_fingerprint(one)


class Broken:
    """A link to ``inner`` on which a chosen message goes wrong."""

    def __init__(self, inner, kind, how):
        self.inner, self.kind, self.how = inner, kind, how

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def poll(self):
        messages = []
        for message in self.inner.poll():
            if message["kind"] == self.kind:
                message = self.how(message)
            if message is not None:
                messages.append(message)
        return messages


def gone(*_):
    raise TransferError("the other side is gone")


def lies(message):
    return {**message, "keys": ["00" * 32] * len(message["keys"])}


class Clock:
    now = 0.0

    def __call__(self):
        Clock.now += 0.5
        return Clock.now


@pytest.mark.parametrize("on_failure", ["recompute", "fail"])
@pytest.mark.parametrize(
    ("kind", "how", "wanted"),
    [
        ("ready", gone, "gone"),
        ("staged", gone, "gone"),
        ("staged", lambda m: {**m, "part": 77}, "not asked"),
        ("staged", lambda m: {"kind": "failed", "id": m["id"], "reason": "lease expired"}, "lease expired"),
        ("ready", lies, "other content"),
        ("ready", lambda m: None, "not complete after 60"),
    ],
    ids=["gone early", "gone late", "unasked", "failed", "lies", "silence"],
)
def test_a_failed_load(on_failure, kind, how, wanted):
    prompts = prompts_of(40)
    decode = pair(on_failure=on_failure, clock=Clock())
    decode.link = Broken(decode.link, kind, how)
    (done,) = decode.generate(prompts, ANSWER)
    assert isinstance(done.transfer_error, TransferError)
    assert wanted in str(done.transfer_error)
    assert done.failed == (on_failure == "fail")
    assert done.token_ids == ([] if done.failed else single(prompts)[0])
    decode.link = decode.link.inner
    decode.step()
    decode.link.close()
    assert_all_given_back(decode)
    (after,) = decode.generate(prompts_of(33, seed=9), ANSWER)
    assert after.num_fetched == 4
    assert after.token_ids == single(prompts_of(33, seed=9))[0]
    assert_all_given_back(decode)


def test_a_lease_that_nobody_fetches_is_given_back():
    clock = Clock()
    link = LocalLink(make_engine(), "small", lease_seconds=10.0)
    link.instance.leases._clock = lambda: clock.now
    link.send({"kind": "prefill", "id": 0, "tokens": prompts_of(40)[0]})
    messages = []
    while not messages:
        messages = link.poll()
    assert messages[0]["kind"] == "ready"
    instance = link.instance
    assert instance.manager.holds()
    clock.now += 9.0
    link.poll()
    assert len(instance.leases) == 1
    clock.now += 1.0
    link.poll()
    assert instance.manager.holds() == []
    assert instance.leases.num_expired == 1
    lease = messages[0]["lease"]
    link.send({"kind": "fetch", "id": 0, "lease": lease, "part": 0, "places": [[0, 0]]})
    (answer,) = link.poll()
    assert answer["kind"] == "failed"
    assert lease in answer["reason"]
    instance.manager.check_invariants()
    assert instance.manager.get_num_free_blocks() == 48


@pytest.mark.parametrize("after", range(0, 14))
def test_cancelled_at_any_time(after):
    prompts = prompts_of(40, 50)
    decode = pair()
    first, second = (decode.submit(prompt, ANSWER) for prompt in prompts)
    for _ in range(after):
        decode.step()
    decode.cancel(first)
    decode.cancel(first)
    while decode.has_unfinished:
        decode.step()
    assert second.token_ids == single(prompts)[1]
    decode.step()
    assert_all_given_back(decode)


def test_more_prompts_than_rows_and_than_blocks():
    prompts = prompts_of(60, 61, 62, 63, 64, 65, 66, 67, 68, shared=16)
    decode = pair()
    managers = decode.manager, decode.link.instance.manager
    for manager in managers:
        for name in ("some", "more"):
            manager.allocate(name, 96)  # leaves half of the pool, and two rows fewer for holds
    done = decode.generate(prompts, ANSWER)
    assert not any(each.failed for each in done)
    for manager in managers:
        manager.free("some")
        manager.free("more")
    assert_all_given_back(decode)
    assert [each.token_ids for each in done] == single(prompts)


def test_a_prefill_step_that_breaks_off(monkeypatch):
    first, second, third = prompts_of(40, 41, 42)
    decode = pair()
    instance = decode.link.instance
    decode.link.send({"kind": "prefill", "id": 77, "tokens": third})
    while not len(instance.leases):
        decode.link.poll()

    def breaks(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(instance.engine, "step", breaks)
    done = decode.generate([first, second], ANSWER)
    monkeypatch.undo()
    assert all("RuntimeError: out of luck" in str(entry.transfer_error) for entry in done)
    assert_all_given_back(decode)  # the lease too: what it kept may be lost
    (after,) = decode.generate([first + [1] * 8], ANSWER)
    assert after.transfer_error is None
    assert [entry.token_ids for entry in [*done, after]] == single([first, second, first + [1] * 8])


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_a_hold_that_a_callback_frees_costs_its_own_load_alone(side):
    prompts = prompts_of(60, 50)
    decode = pair()
    manager = {"decode": decode.manager, "prefill": decode.link.instance.manager}[side]
    entries = [decode.submit(prompt, ANSWER) for prompt in prompts]
    while not manager.holds():
        decode.step()
    if side == "decode":
        while not decode._loads[0][1]._pulls:  # with blocks that have come and can't be written
            decode._hear()
    manager.free(manager.holds()[0])
    while decode.has_unfinished:
        decode.step()
    assert "hold" in str(entries[0].transfer_error)
    assert entries[1].transfer_error is None
    assert_all_given_back(decode)
    assert [entry.token_ids for entry in entries] == single(prompts)


def test_blocks_of_a_cancelled_prompt_serve_the_next_one():
    link = LocalLink(make_engine(side="prefill"), "small")
    instance, (first, second, third) = link.instance, prompts_of(80, 81, 17)
    for name in ("some", "more", "most"):
        instance.manager.allocate(name, 88)
    link.send({"kind": "prefill", "id": 0, "tokens": first})
    while not link.poll():
        pass
    link.send({"kind": "prefill", "id": 1, "tokens": second})
    while instance.has_work:
        assert link.poll() == []  # no room beside what is leased
    assert instance.num_under_way == 1
    link.send({"kind": "cancel", "id": 1})
    link.send({"kind": "prefill", "id": 2, "tokens": third})
    assert [(answer["kind"], answer["id"]) for _ in range(3) for answer in link.poll()] == [("ready", 2)]
    link.close()
    for name in ("some", "more", "most"):
        instance.manager.free(name)
    instance.manager.check_invariants()
    assert instance.manager.get_num_free_blocks() == 48


def test_what_cannot_be_pulled_or_read_is_not_kept(monkeypatch):
    decode = pair()
    with monkeypatch.context() as broken:
        broken.setattr(decode.link, "pull", gone)
        (done,) = decode.generate(prompts_of(40), ANSWER)
        assert "gone" in str(done.transfer_error)
        assert_all_given_back(decode)

    def no_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as broken:
        broken.setattr(decode.link._stage, "put", no_memory)
        (done,) = decode.generate(prompts_of(41, seed=1), ANSWER)
        assert "RESOURCE_EXHAUSTED" in str(done.transfer_error)
        assert_all_given_back(decode)


def test_a_late_release_is_nobodys_failure():
    decode = pair()
    decode.link.send({"kind": "release", "lease": "lease:99"})
    assert decode.link.poll() == []
    decode.link.send({"kind": "fetch", "id": 5, "lease": "lease:99", "part": 0, "places": []})
    assert [answer["id"] for answer in decode.link.poll()] == [5]


def test_a_load_without_room_waits_for_it():
    decode = pair()
    decode.manager.allocate("most", 8 * 12)
    decode.manager.allocate("more", 8 * 12)
    running = decode.submit(prompts_of(80, seed=4)[0][:80], dataclasses.replace(ANSWER, max_tokens=16))
    waiting = decode.submit(prompts_of(85, seed=5)[0], ANSWER)
    third = decode.submit(prompts_of(85, seed=6)[0], ANSWER)
    while decode.has_unfinished:
        decode.step()
    assert [entry.transfer_error for entry in (running, waiting, third)] == [None] * 3
    assert [entry.num_fetched for entry in (running, waiting, third)] == [9, 10, 10]
    decode.manager.free("most")
    decode.manager.free("more")
    assert_all_given_back(decode)


def test_bad_input():
    for wrong in ({"seconds": 0}, {"chunk_bytes": 0}, {"window": 0}):
        with pytest.raises(InvalidArgumentError, match="positive"):
            LoadOptions(**wrong)
    with pytest.raises(ConfigError, match="max_num_reqs: got 4"):
        pair(make_engine(cache_config(max_num_reqs=4)))
    with pytest.raises(ConfigError, match="prefix_caching"):
        pair(decode=make_engine(options=ManagerOptions(prefix_caching=False)))
    with pytest.raises(InvalidArgumentError, match="on_failure"):
        pair(on_failure="retry")
    decode = pair()
    with pytest.raises(RequestTooLongError):
        decode.generate([*prompts_of(10), *prompts_of(95)], ANSWER)
    assert not decode.has_unfinished
    with pytest.raises(TransferError, match="tokens"):
        decode.link.send({"kind": "prefill", "id": 0, "tokens": [-1]})
    decode.link.send({"kind": "prefill", "id": 0, "tokens": [VOCAB] * 20})
    (answer,) = decode.link.poll()
    assert answer["kind"] == "failed"
    assert "vocab" in answer["reason"] or str(VOCAB) in answer["reason"]
    assert_all_given_back(decode)
