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

    def __init__(
        self,
        requests,
        *,
        num_blocks=40,
        block_size=4,
        max_num_seqs=8,
        token_budget=16,
        watermark_blocks=0,
        caching=False,
        swapping=False,
        **options,
    ):
        self.manager = FakeManager(num_blocks, block_size, max_num_seqs, caching=caching, swapping=swapping)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs, token_budget, block_size, num_blocks, 10**6, watermark_blocks, **options)
        )
        self.cached = {}
        self.started = []
        self.num_forks = 0
        self.requests = []
        for i, (prompt, max_tokens, *samples) in enumerate(requests):
            names = [f"r{i}", *(f"r{i}.{sample}" for sample in range(1, samples[0] if samples else 1))]
            first, *others = [
                Request(name, np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens), seed=seed)
                for seed, name in enumerate(names)
            ]
            first.samples = tuple(others)
            self.requests += [first, *others]
            self.add(first)

    def add(self, request):
        for added in self.scheduler.add(request):
            self.manager.add_request(added.request_id, added.prompt)

    def step(self):
        config, manager = self.scheduler.config, self.manager
        schedule = self.scheduler.schedule(manager.get_num_free_blocks, manager.preview)
        ids = [request.request_id for request in schedule.requests]
        assert ids
        assert sum(schedule.num_new_tokens) <= config.token_budget
        for request_id in schedule.free:
            self.cached.pop(request_id)
        ok, counts, cached = manager.step(ids, schedule.num_new_tokens, free=schedule.free)
        tokens = []
        for request, count, skipped, served in zip(schedule.requests, counts, cached, ok, strict=True):
            if served:
                if request.request_id not in self.cached:
                    self.started.append(request.arrival)
                    self.cached[request.request_id] = manager.tokens[request.request_id][:skipped]
                cache = self.cached[request.request_id]
                assert len(cache) == request.num_computed + skipped
                cache.extend(request.next_tokens(skipped, count).tolist())
            tokens.append(token_after([*self.cached.get(request.request_id, []), request.seed]))
        outcome = self.scheduler.update(schedule, ok, counts, cached, tokens)
        for request, token, _ in outcome.new_tokens:
            if request.finish_reason is None:
                manager.record_token(request.request_id, token)
        for parent, child in outcome.forks:
            manager.fork(parent.request_id, child.request_id)
            self.cached[child.request_id] = list(self.cached[parent.request_id])
            self.num_forks += 1
        for request in outcome.queued:
            manager.add_request(request.request_id, request.prompt)
        for request in outcome.preempted:
            manager.preempt(request.request_id)
            self.cached.pop(request.request_id)
        self.check()
        return schedule, ok, outcome

    def check(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        for queue in (running, waiting):
            arrivals = [request.arrival for request in queue]
            assert arrivals == sorted(arrivals)
        if not any(request.samples for request in self.requests):
            assert not running or not waiting or running[-1].arrival < waiting[0].arrival
        assert len(running) <= self.scheduler.config.max_num_seqs
        held = [request.request_id for request in running] + list(self.scheduler._pending_free)
        assert sorted(held) == sorted(self.manager.blocks) == sorted(self.cached)

    def run(self, max_steps=20_000):
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "livelock"
        for request_id in self.scheduler.drop_all():
            self.manager.free(request_id)
        self.cached.clear()
        assert self.manager.get_num_free_blocks() == self.manager.num_blocks

    def check_outputs(self):
        for request in self.requests:
            tokens = request.prompt.tolist()
            for token in request.output:
                assert token == token_after([*tokens, request.seed])
                tokens.append(token)
            assert len(request.output) == request.sampling.max_tokens
            assert request.finish_reason == "length"
        stats = self.scheduler.stats
        assert stats.num_finished == len(self.requests)
        assert stats.num_generated_tokens == sum(len(request.output) for request in self.requests)
        held = stats.num_computed_tokens + stats.num_cached_tokens - stats.num_preempted_tokens
        assert held == sum(request.max_cached_tokens for request in self.requests)


def prompts(*lengths_and_max):
    return [(list(range(5, 5 + length)), max_tokens, *samples) for length, max_tokens, *samples in lengths_and_max]


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
    first_starts = list(dict.fromkeys(world.started))
    assert first_starts == sorted(first_starts)  # first come, first served
    stats = world.scheduler.stats
    assert stats.num_cached_tokens == 0
    assert stats.num_computed_prompt_tokens >= sum(prompt for prompt, _ in traffic)


@settings(max_examples=400, deadline=None)
@given(
    traffic=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=12),
    block_size=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.integers(1, 9),
    extra_budget=st.integers(0, 30),
    spare_blocks=st.integers(0, 20),
    watermark_blocks=st.integers(0, 6),
    caching=st.booleans(),
    swapping=st.booleans(),
    can_fork=st.booleans(),
)
def test_so_it_does_with_shared_prefixes_samples_and_swapping(
    traffic, block_size, max_num_seqs, extra_budget, spare_blocks, watermark_blocks, caching, swapping, can_fork
):
    longest = max(-(-(prompt + output - 1) // block_size) for prompt, output, _ in traffic)
    world = World(
        prompts(*traffic),  # they all begin alike
        num_blocks=longest + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        token_budget=max_num_seqs + extra_budget,
        watermark_blocks=watermark_blocks,
        caching=caching,
        swapping=swapping,
        can_fork=can_fork,
    )
    world.run()
    world.check_outputs()
    assert can_fork or not world.num_forks


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
    assert "r2" not in world.manager.blocks
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
    _, ok, outcome = world.step()
    assert not any(ok)
    assert not outcome.new_tokens
    assert outcome.preempted == [world.requests[1]]
    world.manager.unused += taken  # they come back: there is room for both, but nobody is admitted yet
    schedule, ok, _ = world.step()
    assert [r.request_id for r in schedule.requests] == ["r0"]
    assert schedule.free == []
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


def test_shared_prefixes_admit_more_and_leave_less_to_compute():
    shared = [(list(range(40)), 4)] * 4
    alone = World(shared, num_blocks=24, token_budget=64)
    sharing = World(shared, num_blocks=24, token_budget=64, caching=True)
    for world in (alone, sharing):
        world.step()  # the first prompt, and 24 tokens of the second
    assert len(alone.scheduler.running) == 2
    schedule, ok, _ = sharing.step()
    assert all(ok)
    # Ten blocks each would not fit; all but their last one are there. What was under way when they came is not shared.
    assert [request.request_id for request in schedule.requests] == ["r0", "r1", "r2", "r3"]
    assert schedule.num_new_tokens == [1, 16, 4, 4]
    assert sharing.scheduler.stats.num_cached_tokens == 2 * 36
    for world in (alone, sharing):
        world.run()
        world.check_outputs()
    assert alone.scheduler.stats.num_computed_prompt_tokens == 160
    assert sharing.scheduler.stats.num_computed_prompt_tokens == 80 + 2 * 4


def test_cached_blocks_that_nobody_holds_are_paid_for():
    world = World([(list(range(16)), 1), (list(range(50, 66)), 9)], num_blocks=10, caching=True, token_budget=99)
    world.run()
    late = [Request(f"late{i}", np.arange(16, dtype=np.int32), SamplingParams(max_tokens=5)) for i in range(3)]
    for request in late:
        world.add(request)
    assert world.manager.preview("late0").num_blocks == 4  # three revived, one new
    world.requests = late
    world.scheduler.stats = type(world.scheduler.stats)()
    world.run()
    world.check_outputs()
    assert world.scheduler.stats.num_computed_prompt_tokens == 3 * 4


def test_a_swapped_request_goes_on_where_it_was():
    world = World(prompts((8, 20), (8, 20), (4, 20)), num_blocks=7, token_budget=20, swapping=True)
    while not world.scheduler.stats.num_preemptions:
        _, _, outcome = world.step()
    (last,) = outcome.preempted
    assert last is world.requests[2]
    while last not in world.scheduler.running:
        held = world.manager.swapped["r2"]
        schedule, _, _ = world.step()
    assert schedule.num_new_tokens[schedule.requests.index(last)] == 1
    assert len(world.cached["r2"]) == held + 1
    world.run()
    world.check_outputs()
    assert world.scheduler.stats.num_computed_prompt_tokens == 20


def test_samples_share_all_but_the_last_token_of_their_prompt():
    world = World(prompts((10, 4, 3)), token_budget=8)
    assert world.step()[0].num_new_tokens == [8]
    schedule, _, outcome = world.step()
    assert schedule.num_new_tokens == [1]
    assert not outcome.new_tokens
    assert [child.request_id for _, child in outcome.forks] == ["r0.1", "r0.2"]
    assert {parent.request_id for parent, _ in outcome.forks} == {"r0"}
    schedule, _, outcome = world.step()
    assert [request.request_id for request in schedule.requests] == ["r0", "r0.1", "r0.2"]
    assert schedule.num_new_tokens == [1, 1, 1]
    assert len({new.token for new in outcome.new_tokens}) == 3
    assert world.manager.holders(world.manager.blocks["r0"][0]) == 3
    assert world.manager.holders(world.manager.blocks["r0"][2]) == 1  # copied before it was written
    world.run()
    world.check_outputs()
    assert world.scheduler.stats.num_computed_prompt_tokens == 9 + 3


def test_samples_without_room_wait_and_come_before_later_requests():
    world = World(prompts((9, 12, 4), (5, 3)), max_num_seqs=2, token_budget=8, caching=True)
    while not world.num_forks:
        _, _, outcome = world.step()
    assert [child.request_id for _, child in outcome.forks] + [r.request_id for r in outcome.queued] == [
        "r0.1",
        "r0.2",
        "r0.3",
    ]
    assert [request.request_id for request in world.scheduler.waiting] == ["r0.2", "r0.3", "r1"]
    world.run()
    world.check_outputs()
    assert world.scheduler.stats.num_computed_prompt_tokens == 9 + 3 + (5 - 4)


def test_who_has_finished_holds_a_row_when_others_fork():
    world = World(prompts((3, 1), (9, 9, 2)), max_num_seqs=2, token_budget=16)
    _, _, outcome = world.step()
    assert outcome.new_tokens[0].request.finish_reason == "length"
    assert not outcome.forks
    assert [request.request_id for request in outcome.queued] == ["r1.1"]
    world.run()
    world.check_outputs()


@pytest.mark.parametrize(("length", "can_fork"), [(1, True), (9, False)])
def test_samples_that_need_no_fork_come_as_requests_of_their_own(length, can_fork):
    world = World(prompts((length, 3, 3)), can_fork=can_fork)
    assert len(world.scheduler.waiting) == 3
    world.run()
    world.check_outputs()
    assert not world.num_forks


def test_a_writer_that_lacks_a_block_for_its_copy_makes_others_give_way():
    """It has room in its last block, but shares it: without a block to copy to, it must not wait for ever."""
    world = World(prompts((6, 3, 2)), num_blocks=2, token_budget=16)
    world.step()
    assert world.num_forks == 1
    _, ok, outcome = world.step()
    assert ok == [False, True] or ok == [False, False]
    assert [request.request_id for request in outcome.preempted] == ["r0.1"]
    world.run()
    world.check_outputs()


def test_layer_groups_count_every_groups_blocks():
    world = World([], num_blocks=30)
    config = SchedulerConfig(
        8, 16, block_size=4, num_blocks=30, max_model_len=10**6, num_groups=3, most_blocks=lambda n: 4 + n // 4
    )
    assert config.blocks_for(9) == 9
    world.scheduler = Scheduler(config)
    world.scheduler.validate(90, 10)  # windows give blocks back on the way
    with pytest.raises(RequestTooLongError, match="31 blocks, want at most 30"):
        world.scheduler.validate(100, 9)


def test_stop_token_ends_a_request():
    prompt = [1, 2, 3]
    first = token_after([*prompt, 0])
    stop = token_after([*prompt, first, 0])
    world = World([])
    request = Request("a", np.array(prompt, np.int32), SamplingParams(max_tokens=9), stop_token_ids=frozenset([stop]))
    world.add(request)
    world.run()
    assert request.output == [first, stop]
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


@pytest.mark.parametrize(
    "sizes", [{"max_num_seqs": 0}, {"token_budget": 3}, {"watermark_blocks": -1}, {"num_groups": 0}]
)
def test_bad_sizes(sizes):
    good = {"max_num_seqs": 4, "token_budget": 8, "block_size": 4, "num_blocks": 10, "max_model_len": 100}
    with pytest.raises(InvalidArgumentError, match=r"got .*want"):
        SchedulerConfig(**{**good, **sizes})
