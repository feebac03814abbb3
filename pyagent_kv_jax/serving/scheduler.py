"""Who is served in the next step: continuous batching with chunked prefill, shared prefixes and preemption.

Plain Python, knows nothing of arrays. Its one truth about memory is the answer of the cache manager: a request the
manager refuses sits out the step. The scheme is that of Orca (continuous batching), Sarathi (chunked prefill under a
token budget) and vLLM (prefix caching, preemption).

Why it always ends. Blocks are taken away only from the newest request that runs, and only while another one runs. So
the oldest that runs keeps what it has; each time it is refused, somebody newer gives way (or those who finished do),
and nobody is admitted in the next step; alone, it fits, for it was checked on arrival, and holding shared blocks or
coming back from host memory takes no more than having them alone. So it finishes, or one that waits and is older (a
sample that found no room beside its siblings) is admitted before and is the oldest from then on; there are only so
many older ones. What is guessed here about blocks (how many a request gives back that shares some, or that has lost
some to a window) decides only how soon somebody is admitted or gives way.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pyagent_kv_jax.errors import InvalidArgumentError, OutOfBlocksError, RequestTooLongError
from pyagent_kv_jax.manager.step_plan import AdmissionPreview
from pyagent_kv_jax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the cache.

    Attributes:
        max_num_seqs: requests running at once.
        token_budget: tokens computed in one step; at least ``max_num_seqs``, so that every running request can decode.
        block_size: tokens of one block.
        num_blocks: blocks of the pool.
        max_model_len: tokens of one row.
        watermark_blocks: a waiting request is admitted only if this many blocks stay free for those that run.
        num_groups: layer groups; each takes blocks of its own.
        most_blocks: most blocks that a request of so many tokens holds at once. None: ``blocks_for``.
        can_fork: whether the cache can share a request's blocks with another that is under way.

    Raises:
        InvalidArgumentError: a size below 1 (``watermark_blocks``: below 0), or a budget below ``max_num_seqs``.
    """

    max_num_seqs: int
    token_budget: int
    block_size: int
    num_blocks: int
    max_model_len: int
    watermark_blocks: int = 0
    num_groups: int = 1
    most_blocks: Callable[[int], int] | None = None
    can_fork: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in ("most_blocks", "can_fork"):
                continue
            value, least = getattr(self, field.name), 0 if field.name == "watermark_blocks" else 1
            if not isinstance(value, numbers.Integral) or value < least:
                raise InvalidArgumentError(f"SchedulerConfig.{field.name}: got {value!r}, want an integer >= {least}")
        if self.token_budget < self.max_num_seqs:
            raise InvalidArgumentError(
                f"SchedulerConfig.token_budget: got {self.token_budget}, want at least max_num_seqs {self.max_num_seqs}"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one request take, if none is shared or out of sight."""
        return -(-num_tokens // self.block_size) * self.num_groups


class Schedule(NamedTuple):
    """What the manager is asked for in one step: requests, most urgent first, their token counts, and who is freed."""

    requests: list[Request]
    num_new_tokens: list[int]
    free: list[str]


class NewToken(NamedTuple):
    """A token that a request has just generated."""

    request: Request
    token: int
    row: int  # of the step that made it


class Outcome(NamedTuple):
    """What follows from a step, to be carried out before the next one.

    Attributes:
        new_tokens: in row order.
        forks: (parent, child) each.
        queued: requests that wait from now on and are new to the cache.
        preempted: requests whose blocks are to be taken away.
    """

    new_tokens: list[NewToken]
    forks: list[tuple[Request, Request]]
    queued: list[Request]
    preempted: list[Request]


@dataclasses.dataclass
class SchedulerStats:
    """Counts since the scheduler was made.

    Attributes:
        num_steps: steps taken in.
        num_finished: requests, each sample counted.
        num_preemptions: requests whose blocks were taken away.
        num_swapped: those of them that went to host memory.
        num_refusals: requests that sat out a step.
        num_computed_tokens: tokens that went through the model.
        num_computed_prompt_tokens: those of them that belong to prompts.
        num_cached_tokens: tokens that requests had without computing them: found in the prefix cache, shared by a fork,
            or brought back from host memory.
        num_preempted_tokens: tokens that preempted requests had.
        num_generated_tokens: tokens chosen.
    """

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_swapped: int = 0
    num_refusals: int = 0
    num_computed_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preempted_tokens: int = 0
    num_generated_tokens: int = 0


class Scheduler:
    """Queues of requests; ``schedule`` proposes a step, ``update`` takes in how it went."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting: list[Request] = []  # both by arrival
        self.running: list[Request] = []
        self.stats = SchedulerStats()
        self._pending_free: dict[str, int] = {}  # id -> blocks the next step gives back
        self._arrivals = 0
        self._admit = True

    def validate(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Check that a request can be served when it has the cache to itself.

        Raises:
            InvalidArgumentError: an empty prompt.
            RequestTooLongError: more tokens than a row or the pool holds.
        """
        if num_prompt_tokens < 1:
            raise InvalidArgumentError("prompt: got 0 tokens, want at least 1")
        cached = num_prompt_tokens + max_tokens - 1
        what = f"{num_prompt_tokens} prompt tokens with max_tokens={max_tokens} need {cached} tokens of cache"
        if cached > self.config.max_model_len:
            raise RequestTooLongError(f"{what}, want at most {self.config.max_model_len} (one row)")
        most = (self.config.most_blocks or self.config.blocks_for)(cached)
        if most > self.config.num_blocks:
            raise RequestTooLongError(f"{what}, {most} blocks, want at most {self.config.num_blocks} (the pool)")

    def add(self, request: Request) -> list[Request]:
        """Queue a request behind all that came before.

        Returns:
            Those that wait now: it, and its other samples where they have nothing to share with it but full blocks.

        Raises:
            InvalidArgumentError, RequestTooLongError: as ``validate``; nothing changes.
        """
        self.validate(len(request.prompt), request.sampling.max_tokens)
        for one in (request, *request.samples):
            one.arrival = self._arrivals
            self._arrivals += 1
        request.is_split = len(request.prompt) == 1 or not self.config.can_fork
        added = [request, *(request.samples if request.is_split else ())]
        self.waiting += added
        return added

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return bool(self.waiting or self.running)

    # -- before a step -----------------------------------------------------------------------------------------

    def schedule(self, num_free_blocks: Callable[[], int], preview: Callable[[str], AdmissionPreview]) -> Schedule:
        """Propose the next step; changes nothing.

        Decodes come first, by arrival; then prompts under way, in chunks; then, if there is room, waiting requests.

        Args:
            num_free_blocks: asks the manager; called only when somebody waits.
            preview: asks it about one that waits.
        """
        requests = [request for request in self.running if request.num_pending == 1]
        counts = [1] * len(requests)
        budget = self.config.token_budget - len(requests)
        chunked: Iterator[tuple[Request, int]] = (
            (request, request.num_wanted()) for request in self.running if request.num_pending > 1
        )
        if self.waiting and (self._admit or not self.running):
            chunked = itertools.chain(chunked, self._admissible(num_free_blocks, preview))
        while budget and (chunk := next(chunked, None)) is not None:
            requests.append(chunk[0])
            counts.append(min(budget, chunk[1]))
            budget -= counts[-1]
        return Schedule(requests, counts, list(self._pending_free))

    def _admissible(
        self, num_free_blocks: Callable[[], int], preview: Callable[[str], AdmissionPreview]
    ) -> Iterator[tuple[Request, int]]:
        """The first waiting requests whose known tokens fit beside those of the running ones; what each has to compute.

        Whoever is asked for last may be one too many for the budget.
        """
        blocks_for = self.config.blocks_for
        spare = num_free_blocks() + sum(self._pending_free.values()) - self.config.watermark_blocks
        spare -= sum(blocks_for(r.num_tokens) - blocks_for(r.num_computed) for r in self.running)
        nobody_else = not self.running
        for request in self.waiting[: self.config.max_num_seqs - len(self.running)]:
            ahead = preview(request.request_id)
            spare -= ahead.num_blocks
            if spare < 0 and not nobody_else:
                return
            nobody_else = False  # with nobody else about, the watermark serves nobody
            yield request, request.num_wanted(ahead.num_cached_tokens)

    # -- after a step ------------------------------------------------------------------------------------------

    def update(
        self,
        schedule: Schedule,
        ok: Sequence[bool],
        num_tokens: Sequence[int],
        num_cached_tokens: Sequence[int],
        tokens: Sequence[int],
    ) -> Outcome:
        """Take in a step.

        Args:
            schedule: what was proposed.
            ok: who was served.
            num_tokens: tokens that each computed.
            num_cached_tokens: tokens that each had before those without computing them, where it was admitted.
            tokens: the token each row chose; of use only where a row is complete.

        Returns:
            What follows. Finished requests have their ``finish_reason`` and have left the queues.

        Raises:
            OutOfBlocksError: nothing can ever be served, because somebody outside this scheduler holds the blocks.
        """
        self.stats.num_steps += 1
        for request_id in schedule.free:
            del self._pending_free[request_id]
        new_tokens: list[NewToken] = []
        refused: list[tuple[Request, int]] = []
        for row, request in enumerate(schedule.requests):
            if not ok[row]:
                refused.append((request, schedule.num_new_tokens[row]))
                continue
            self._take_in(request, num_tokens[row], num_cached_tokens[row])
            if request.num_pending == 0:
                new_tokens.append(NewToken(request, int(tokens[row]), row))
                request.append(new_tokens[-1].token)
        self.stats.num_generated_tokens += len(new_tokens)
        self.stats.num_refusals += len(refused)
        self._retire(new_tokens)
        preempted = self._make_room(refused, served_any=len(refused) < len(schedule.requests))
        forks, queued = self._split(schedule.requests)
        return Outcome(new_tokens, forks, queued, preempted)

    def _take_in(self, request: Request, num_computed: int, num_cached: int) -> None:
        if request.num_computed == 0:
            self.waiting.remove(request)
            _insert(self.running, request)
        begin = request.num_computed + num_cached
        request.num_computed = begin + num_computed
        self.stats.num_cached_tokens += num_cached
        self.stats.num_computed_tokens += num_computed
        in_prompt = min(request.num_computed, len(request.prompt)) - begin
        self.stats.num_computed_prompt_tokens += max(in_prompt, 0)

    def _retire(self, new_tokens: list[NewToken]) -> None:
        finished = [request for request, _, _ in new_tokens if request.finish_reason is not None]
        if finished:
            self.running = [request for request in self.running if request.finish_reason is None]
            self.stats.num_finished += len(finished)
            for request in finished:
                self._pending_free[request.request_id] = self.config.blocks_for(request.num_computed)

    def _make_room(self, refused: list[tuple[Request, int]], served_any: bool) -> list[Request]:
        """Preempt the newest running requests until the refused ones that run can go on."""
        blocks_for = self.config.blocks_for
        wants = {
            # At least one block a group: it may have none to add, but one to copy before it writes.
            request.request_id: max(
                blocks_for(request.num_computed + count) - blocks_for(request.num_computed), self.config.num_groups
            )
            for request, count in refused
            if request.num_computed > 0
        }
        self._admit = not wants
        preempted: list[Request] = []
        room = sum(self._pending_free.values())
        while sum(wants.values()) > room and len(self.running) > 1:
            room += blocks_for(self.running[-1].num_computed)
            preempted.append(self._preempt_newest())
            wants.pop(preempted[-1].request_id, None)
        if refused and not served_any and not self._pending_free and not preempted:
            request, count = refused[0]
            raise OutOfBlocksError(
                f"request {request.request_id!r} wants {blocks_for(request.num_computed + count)} blocks and was "
                f"refused with nobody left to preempt: blocks of the pool ({self.config.num_blocks}) are held elsewhere"
            )
        return preempted

    def _preempt_newest(self) -> Request:
        request = self.running.pop()
        self.stats.num_preemptions += 1
        self.stats.num_preempted_tokens += request.num_computed
        request.num_preemptions += 1
        request.num_computed = 0  # whatever comes back, the step that admits it will tell
        _insert(self.waiting, request)
        return request

    def _split(self, served: list[Request]) -> tuple[list[tuple[Request, Request]], list[Request]]:
        """Let samples go their own ways: forks where there is room, else requests that wait like any other.

        The time has come when all but the last token of the prompt is computed: the last one makes the first token.
        """
        forks: list[tuple[Request, Request]] = []
        queued: list[Request] = []
        for request in served:
            if not request.must_split:
                continue
            at_last_token = request.num_computed > 0 and request.num_pending == 1 and not request.output
            if not at_last_token and not request.output:  # under way, refused or preempted
                continue
            request.is_split = True
            # Who has finished has a row until the next step.
            room = self.config.max_num_seqs - len(self.running) - len(self._pending_free) if at_last_token else 0
            for i, child in enumerate(request.samples):
                if i < room:
                    child.num_computed = request.num_computed
                    self.stats.num_cached_tokens += child.num_computed
                    _insert(self.running, child)
                    forks.append((request, child))
                else:
                    _insert(self.waiting, child)
                    queued.append(child)
        return forks, queued

    def drop(self, request: Request) -> list[str]:
        """Forget one request and its other samples; the ids of those that the cache knows and nobody frees."""
        dropped = [one for one in (request, *request.samples) if one in self.running or one in self.waiting]
        self.running = [one for one in self.running if one not in dropped]
        self.waiting = [one for one in self.waiting if one not in dropped]
        return [one.request_id for one in dropped]

    def drop_all(self) -> list[str]:
        """Forget every request; returns all ids that the cache may know.

        Waiting ones among them: where a step broke off between the manager's answer and ``update``, the manager has
        admitted requests that this scheduler still takes for waiting.
        """
        ids = [*(request.request_id for request in self.running + self.waiting), *self._pending_free]
        self.waiting, self.running, self._pending_free, self._admit = [], [], {}, True
        return list(dict.fromkeys(ids))


def _insert(queue: list[Request], request: Request) -> None:
    bisect.insort(queue, request, key=lambda r: r.arrival)
