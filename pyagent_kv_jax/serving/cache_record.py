"""What every step left in the cache: who holds which memory, and how much of it is used."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from pyagent_kv_jax.manager.step_plan import StepPlan
from pyagent_kv_jax.serving.scheduler import Outcome, Schedule

FREE = -1


class _Step(NamedTuple):
    request_ids: list[str]
    plan: StepPlan
    freed: list[str]  # by this step
    preempted: list[str]  # after it


@dataclasses.dataclass
class CacheRecord:
    """Collects steps while an engine runs (``engine.on_step = record.add``) and makes sense of them afterwards.

    For caches in which every request has blocks of its own: without prefix caching or forks, and one layer group.

    Attributes:
        num_blocks: of the cache.
        block_size: tokens of one block.
    """

    num_blocks: int
    block_size: int
    _steps: list[_Step] = dataclasses.field(default_factory=list)

    def add(self, schedule: Schedule, plan: StepPlan, outcome: Outcome) -> None:
        """Note one step; keeps references only, so that it costs a timed run nothing."""
        ids, preempted = ([r.request_id for r in requests] for requests in (schedule.requests, outcome.preempted))
        self._steps.append(_Step(ids, plan, schedule.free, preempted))

    def history(self, unit: int) -> CacheHistory:
        """Play the steps back.

        Args:
            unit: tokens of memory that one line of the map stands for; divides ``block_size``.
        """
        units = self.block_size // unit
        owner = np.full((len(self._steps), self.num_blocks, units), FREE, np.int32)
        used = np.zeros(owner.shape, bool)
        totals = np.zeros((3, len(self._steps)), np.int64)
        numbers: dict[str, int] = {}
        live: dict[str, tuple[np.ndarray, int]] = {}  # request -> its blocks, its tokens
        for t, (request_ids, plan, freed, preempted) in enumerate(self._steps):
            for request_id in freed:
                del live[request_id]
            meta = plan.metadata
            for row, (request_id, ok) in enumerate(zip(request_ids, plan.ok, strict=True)):
                if ok:
                    blocks = np.asarray(meta.block_tables[row])
                    live[request_id] = blocks[blocks >= 0], int(meta.kv_lens[row])
            for request_id, (blocks, tokens) in live.items():
                owner[t, blocks] = numbers.setdefault(request_id, len(numbers))
                used[t, blocks] = (np.arange(len(blocks) * units) * unit < tokens).reshape(len(blocks), units)
                totals[:, t] += 1, len(blocks) * self.block_size, tokens
            for request_id in preempted:
                del live[request_id]
        shape = (len(self._steps), self.num_blocks * units)
        return CacheHistory(owner.reshape(shape), used.reshape(shape), *totals)


class CacheHistory(NamedTuple):
    """The cache over T steps.

    Attributes:
        owner: i32[T, U], the request that holds each unit of memory, -1: free. Requests are numbered as they came.
        used: bool[T, U], whether it holds a token.
        in_flight: i64[T], requests that hold memory.
        reserved_tokens: i64[T], tokens that the memory they hold has room for.
        used_tokens: i64[T], tokens they have in it.
    """

    owner: np.ndarray
    used: np.ndarray
    in_flight: np.ndarray
    reserved_tokens: np.ndarray
    used_tokens: np.ndarray

    @property
    def waste(self) -> float:
        """Share of the reserved memory that holds nothing, over all steps."""
        return 1.0 - float(self.used_tokens.sum()) / float(self.reserved_tokens.sum())
