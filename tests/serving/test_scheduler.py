"""The scheduler alone, against a manager made of Python sets: random traffic and the cases that matter."""

import numpy as np
import pytest
from fake_manager import FakeManager
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax.errors import InvalidArgumentError, OutOfBlocksError, RequestTooLongError
from pyagent_kv_jax.serving.request import Request
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.scheduler import Scheduler, SchedulerConfig


def token_after(tokens):
    """The "model": the next token is a hash of all before it, so a lost or doubled token shows."""
    value = 17
    for token in tokens:
        value = (value * 31 + int(token) + 1) % 10_007
    return value


class World:
    """A scheduler, a manager, and a cache that records which tokens were computed where."""

    def __init__(self, requests, *, num_blocks=40, block_size=4, max_num_seqs=8, token_budget=16, watermark_blocks=0):
        self.manager = FakeManager(num_blocks, block_size, max_num_seqs)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs, token_budget, block_size, num_blocks, 10**6, watermark_blocks)
        )
        self.cached = {}
        self.started = []
        self.requests = [
            Request(f"r{i}", np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens))
            for i, (prompt, max_tokens) in enumerate(requests)
        ]
        for request in self.requests:
            self.scheduler.add(request)

    def step(self):
        config = self.scheduler.config
        schedule = self.scheduler.schedule(self.manager.get_num_free_blocks)
        ids = [request.request_id for request in schedule.requests]
        assert ids
        assert sum(schedule.num_new_tokens) <= config.token_budget
        for request_id in schedule.free:
            self.cached.pop(request_id)
        ok = self.manager.step(ids, schedule.num_new_tokens, free=schedule.free)
        tokens = []
        for request, count, served in zip(schedule.requests, schedule.num_new_tokens, ok, strict=True):
            if served:
                if request.request_id not in self.cached:
                    self.started.append(request.arrival)
                cache = self.cached.setdefault(request.request_id, [])
                assert len(cache) == request.num_computed
                cache.extend(request.next_tokens(count).tolist())
            tokens.append(token_after(self.cached.get(request.request_id, [])))
        new_tokens = self.scheduler.update(schedule, ok, tokens)
        self.check()
        return schedule, ok, new_tokens

    def check(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        arrivals = [request.arrival for request in running + waiting]
        assert arrivals == sorted(arrivals)  # whoever runs is older than whoever waits
        assert len(running) <= self.scheduler.config.max_num_seqs
        held = [request.request_id for request in running] + list(self.scheduler._pending_free)
        assert sorted(held) == sorted(self.manager.blocks)

    def run(self, max_steps=20_000):
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "livelock"
        for request_id in self.scheduler.drop_all():
            self.manager.free(request_id)
        assert self.manager.get_num_free_blocks() == self.manager.num_blocks

    def check_outputs(self):
        for request in self.requests:
            tokens = request.prompt.tolist()
            for token in request.output:
                assert token == token_after(tokens)
                tokens.append(token)
            assert len(request.output) == request.sampling.max_tokens
            assert request.finish_reason == "length"


def prompts(*lengths_and_max):
    return [(list(range(5, 5 + length)), max_tokens) for length, max_tokens in lengths_and_max]


@settings(max_examples=400, deadline=None)
@given(
    traffic=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25),
    block_size=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.integers(1, 9),
    extra_budget=st.integers(0, 30),
    spare_blocks=st.integers(0, 20),
    watermark_blocks=st.integers(0, 6),
)
def test_random_traffic_finishes_with_exactly_its_tokens(
    traffic, block_size, max_num_seqs, extra_budget, spare_blocks, watermark_blocks
):
    longest = max(-(-(prompt + output - 1) // block_size) for prompt, output in traffic)
    world = World(
        prompts(*traffic),
        num_blocks=longest + spare_blocks,  # now and then exactly one request fits
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        token_budget=max_num_seqs + extra_budget,
        watermark_blocks=watermark_blocks,
    )
    world.run()
    world.check_outputs()
    stats = world.scheduler.stats
    assert stats.num_finished == len(traffic)
    assert stats.num_generated_tokens == sum(output for _, output in traffic)
    first_starts = list(dict.fromkeys(world.started))
    assert first_starts == sorted(first_starts)  # first come, first served
    kept = stats.num_computed_tokens - stats.num_recomputed_tokens
    assert kept == sum(prompt + output - 1 for prompt, output in traffic)


def test_decodes_come_first_then_prompts_in_chunks():
    world = World(prompts((3, 5), (30, 5), (3, 5)), token_budget=8)
    assert world.step()[0].num_new_tokens == [3, 5]
    schedule, _, _ = world.step()
    assert [r.request_id for r in schedule.requests] == ["r0", "r1"]
    assert schedule.num_new_tokens == [1, 7]


def test_the_newest_running_request_gives_way_and_comes_back():
    world = World(prompts((8, 20), (8, 20), (4, 20)), num_blocks=7, token_budget=20)
    while not world.scheduler.stats.num_preemptions:
        _, ok, _ = world.step()
    assert not all(ok)
    assert [r.num_preemptions for r in world.requests] == [0, 0, 1]
    assert world.scheduler.waiting[0] is world.requests[2]
    generated = list(world.requests[2].output)
    assert generated
    schedule, ok, _ = world.step()  # nobody is admitted right after a preemption
    assert schedule.free == ["r2"]
    assert world.requests[2] not in schedule.requests
    assert all(ok)
    world.run()
    world.check_outputs()
    assert world.requests[2].output[: len(generated)] == generated
    assert world.requests[0].num_preemptions == 0


def test_when_nobody_can_be_served_one_gives_way_at_once():
    world = World(prompts((4, 8), (4, 8)), num_blocks=4, block_size=4, token_budget=8)
    world.step()  # both prompts: a block each
    taken, world.manager.unused = world.manager.unused, []  # somebody else takes the last blocks
    _, ok, new_tokens = world.step()
    assert not any(ok)
    assert not new_tokens
    assert world.requests[1].num_preemptions == 1
    world.manager.unused += taken  # they come back: there is room for both, but one is only now being freed
    schedule, ok, _ = world.step()
    assert [r.request_id for r in schedule.requests] == ["r0"]
    assert schedule.free == ["r1"]
    assert ok == [True]
    world.run()
    world.check_outputs()


def test_as_many_give_way_as_the_others_need():
    world = World(prompts((4, 8), (4, 8), (4, 8), (4, 8)), num_blocks=4, block_size=4)
    world.step()  # each prompt fills its block
    _, ok, _ = world.step()  # and now each wants one more
    assert not any(ok)
    assert [r.num_preemptions for r in world.requests] == [0, 0, 1, 1]
    assert all(world.step()[1])


def test_watermark_keeps_blocks_for_those_that_run():
    lengths = [(8, 4), (8, 4), (8, 4)]
    eager = World(prompts(*lengths), num_blocks=6, token_budget=64)
    careful = World(prompts(*lengths), num_blocks=6, token_budget=64, watermark_blocks=2)
    assert len(eager.step()[0].requests) == 3
    assert len(careful.step()[0].requests) == 2
    careful.run()
    careful.check_outputs()
    assert careful.scheduler.stats.num_preemptions == 0


def test_watermark_never_holds_up_the_only_request():
    world = World(prompts((8, 1)), num_blocks=2, watermark_blocks=5)
    world.run()
    world.check_outputs()


def test_stop_token_ends_a_request():
    prompt = [1, 2, 3]
    stop = token_after([*prompt, token_after(prompt)])
    world = World([])
    request = Request("a", np.array(prompt, np.int32), SamplingParams(max_tokens=9), stop_token_ids=frozenset([stop]))
    world.scheduler.add(request)
    world.run()
    assert request.output == [token_after(prompt), stop]
    assert request.finish_reason == "stop"


def test_blocks_held_elsewhere_raise_instead_of_spinning():
    world = World(prompts((8, 4)), num_blocks=3)
    world.manager.unused = world.manager.unused[:1]
    with pytest.raises(OutOfBlocksError, match="held elsewhere"):
        world.step()
    world = World(prompts((8, 4)), num_blocks=3)
    world.step()
    world.manager.unused.clear()
    with pytest.raises(OutOfBlocksError, match="held elsewhere"):
        world.step()


@pytest.mark.parametrize(
    ("length", "max_tokens", "error", "message"),
    [
        (0, 1, InvalidArgumentError, "got 0 tokens"),
        (40, 2, RequestTooLongError, "the pool"),
        (100, 2, RequestTooLongError, "one row"),
        (99, 3, RequestTooLongError, "one row"),
    ],
)
def test_what_can_never_fit_is_refused_on_arrival(length, max_tokens, error, message):
    scheduler = Scheduler(SchedulerConfig(4, 8, block_size=4, num_blocks=10, max_model_len=100))
    with pytest.raises(error, match=message):
        scheduler.add(Request("a", np.ones(length, np.int32), SamplingParams(max_tokens=max_tokens)))
    assert not scheduler.has_unfinished
    scheduler.add(Request("b", np.ones(40, np.int32), SamplingParams(max_tokens=1)))  # exactly fits


@pytest.mark.parametrize("sizes", [{"max_num_seqs": 0}, {"token_budget": 3}, {"watermark_blocks": -1}])
def test_bad_sizes(sizes):
    good = {"max_num_seqs": 4, "token_budget": 8, "block_size": 4, "num_blocks": 10, "max_model_len": 100}
    with pytest.raises(InvalidArgumentError, match=r"got .*want"):
        SchedulerConfig(**{**good, **sizes})
