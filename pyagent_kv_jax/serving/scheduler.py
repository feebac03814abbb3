"""Who is served in the next step: continuous batching with chunked prefill and preemption by recompute.

Plain Python, knows nothing of arrays. Its one truth about memory is the answer of the cache manager: a request the
manager refuses sits out the step. The scheme is that of Orca (continuous batching), Sarathi (chunked prefill under a
token budget) and vLLM (preemption by recompute).

Why it always ends: the running requests are older than the waiting ones, and blocks are taken away only from the
newest that runs. So the oldest request keeps what it has; each time it is refused, somebody newer gives way and nobody
is admitted in the next step; alone, it fits, for it was checked on arrival.
"""

from __future__ import annotations

import bisect
import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyagent_kv_jax.errors import InvalidArgumentError, OutOfBlocksError, RequestTooLongError
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

    Raises:
        InvalidArgumentError: a size below 1 (``watermark_blocks``: below 0), or a budget below ``max_num_seqs``.
    """

    max_num_seqs: int
    token_budget: int
    block_size: int
    num_blocks: int
    max_model_len: int
    watermark_blocks: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "watermark_blocks" else 1
            if not isinstance(value, numbers.Integral) or value < least:
                raise InvalidArgumentError(f"SchedulerConfig.{field.name}: got {value!r}, want an integer >= {least}")
        if self.token_budget < self.max_num_seqs:
            raise InvalidArgumentError(
                f"SchedulerConfig.token_budget: got {self.token_budget}, want at least max_num_seqs {self.max_num_seqs}"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one request take."""
        return -(-num_tokens // self.block_size)


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


@dataclasses.dataclass
class SchedulerStats:
    """Counts since the scheduler was made."""

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_refusals: int = 0
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0  # computed tokens that a preemption threw away
    num_generated_tokens: int = 0


class Scheduler:
    """Queues of requests; ``schedule`` proposes a step, ``update`` takes in how it went."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting: list[Request] = []  # both by arrival; everything running is older than everything waiting
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
        if self.config.blocks_for(cached) > self.config.num_blocks:
            raise RequestTooLongError(
                f"{what}, {self.config.blocks_for(cached)} blocks, want at most {self.config.num_blocks} (the pool)"
            )

    def add(self, request: Request) -> None:
        """Queue a request behind all that came before.

        Raises:
            InvalidArgumentError, RequestTooLongError: as ``validate``; nothing changes.
        """
        self.validate(len(request.prompt), request.sampling.max_tokens)
        request.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return bool(self.waiting or self.running)

    def schedule(self, num_free_blocks: Callable[[], int]) -> Schedule:
        """Propose the next step; changes nothing.

        Decodes come first, by arrival; then prompts under way, in chunks; then, if there is room, waiting requests.

        Args:
            num_free_blocks: asks the manager; called only when somebody waits.
        """
        requests = [request for request in self.running if request.num_pending == 1]
        counts = [1] * len(requests)
        budget = self.config.token_budget - len(requests)
        chunked = [request for request in self.running if request.num_pending > 1]
        if self.waiting and (self._admit or not self.running):
            chunked += self._admissible(num_free_blocks)
        for request in chunked:
            if budget == 0:
                break
            counts.append(min(budget, request.num_pending))
            budget -= counts[-1]
            requests.append(request)
        return Schedule(requests, counts, list(self._pending_free))

    def _admissible(self, num_free_blocks: Callable[[], int]) -> list[Request]:
        """The first waiting requests whose known tokens fit beside those of the running ones."""
        blocks_for = self.config.blocks_for
        spare = num_free_blocks() + sum(self._pending_free.values()) - self.config.watermark_blocks
        spare -= sum(blocks_for(r.num_tokens) - blocks_for(r.num_computed) for r in self.running)
        admissible: list[Request] = []
        for request in self.waiting[: self.config.max_num_seqs - len(self.running)]:
            spare -= blocks_for(request.num_tokens)
            if spare < 0 and (self.running or admissible):
                break
            admissible.append(request)  # with nobody else about, the watermark serves nobody
        return admissible

    def update(self, schedule: Schedule, ok: Sequence[bool], tokens: Sequence[int]) -> list[NewToken]:
        """Take in a step: who was served, and the token each row chose (of use only where a row is complete).

        Returns:
            The new tokens, in row order. Finished requests have their ``finish_reason`` and have left the queues.

        Raises:
            OutOfBlocksError: nothing can ever be served, because somebody outside this scheduler holds the blocks.
        """
        self.stats.num_steps += 1
        for request_id in schedule.free:
            del self._pending_free[request_id]
        new_tokens: list[NewToken] = []
        refused: list[tuple[Request, int]] = []
        for row, (request, count, served) in enumerate(
            zip(schedule.requests, schedule.num_new_tokens, ok, strict=True)
        ):
            if not served:
                refused.append((request, count))
                continue
            if request.num_computed == 0:
                self._start(request)
            request.num_computed += count
            self.stats.num_computed_tokens += count
            if request.num_pending == 0:
                new_tokens.append(NewToken(request, int(tokens[row]), row))
                request.append(new_tokens[-1].token)
        self.stats.num_generated_tokens += len(new_tokens)
        self.stats.num_refusals += len(refused)
        self._retire(new_tokens)
        self._make_room(refused, served_any=len(refused) < len(schedule.requests))
        return new_tokens

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=lambda r: r.arrival)

    def _retire(self, new_tokens: list[NewToken]) -> None:
        finished = [request for request, _, _ in new_tokens if request.finish_reason is not None]
        if finished:
            self.running = [request for request in self.running if request.finish_reason is None]
            self.stats.num_finished += len(finished)
            for request in finished:
                self._pending_free[request.request_id] = self.config.blocks_for(request.num_computed)

    def _make_room(self, refused: list[tuple[Request, int]], served_any: bool) -> None:
        """Preempt the newest running requests until the refused ones that run can go on."""
        blocks_for = self.config.blocks_for
        wants = {
            request.request_id: blocks_for(request.num_computed + count) - blocks_for(request.num_computed)
            for request, count in refused
            if request.num_computed > 0
        }
        self._admit = not wants
        while sum(wants.values()) > sum(self._pending_free.values()) and len(self.running) > 1:
            wants.pop(self._preempt_newest(), None)
        if refused and not served_any and not self._pending_free:
            request, count = refused[0]
            raise OutOfBlocksError(
                f"request {request.request_id!r} wants {blocks_for(request.num_computed + count)} blocks and was "
                f"refused with nobody left to preempt: blocks of the pool ({self.config.num_blocks}) are held elsewhere"
            )

    def _preempt_newest(self) -> str:
        request = self.running.pop()
        self._pending_free[request.request_id] = self.config.blocks_for(request.num_computed)
        self.stats.num_preemptions += 1
        self.stats.num_recomputed_tokens += request.num_computed
        request.num_preemptions += 1
        request.num_computed = 0
        bisect.insort(self.waiting, request, key=lambda r: r.arrival)
        return request.request_id

    def drop_all(self) -> list[str]:
        """Forget every request; returns all ids that may hold blocks.

        Waiting ones among them: where a step broke off between the manager's answer and ``update``, the manager has
        admitted requests that this scheduler still takes for waiting.
        """
        ids = [*(request.request_id for request in self.running + self.waiting), *self._pending_free]
        self.waiting, self.running, self._pending_free, self._admit = [], [], {}, True
        return list(dict.fromkeys(ids))
