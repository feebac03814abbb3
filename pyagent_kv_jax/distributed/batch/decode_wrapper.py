"""Decode over K and V that are spread by token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from pyagent_kv_jax.arguments import static_count
from pyagent_kv_jax.distributed.batch.batch_executor import MeshBatchExecutor
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase
from pyagent_kv_jax.distributed.batch.execution_plan import ExecutionPlan
from pyagent_kv_jax.errors import InvalidArgumentError, RequestTooLongError


class BatchDCPDecodeWrapper(MeshBatchExecutor):
    """A token a request and step, or several (speculative), over a cache spread by token (DCP).

    Each rank attends to the tokens it holds, and shares are merged by LSE (Helix, arXiv 2507.07120), in the form and
    with the reduction that the config's ``CacheSharding`` says. All batches take that way, with context or without, so
    that one program serves them all.
    """

    phase: ClassVar[BatchPhase] = BatchPhase.DECODE
    _skip_context: ClassVar[bool] = False

    def num_steps_ahead(self, plan: ExecutionPlan) -> int:
        """How many tokens more each of the plan's requests has room for in the blocks it was planned with."""
        return int(self._room(plan).min(initial=self.config.cache.max_request_tokens))

    def advance(self, plan: ExecutionPlan, num_query_tokens: int = 1) -> ExecutionPlan:
        """The plan of the step after ``plan``'s: the same requests, each with so many tokens more.

        Into the blocks that they were planned with; see ``num_steps_ahead``.

        Raises:
            ConfigError: a plan of another config.
            InvalidArgumentError: a count below 1, blocks missing for so many, or more in all than a batch may have.
            InvalidBlockError: a block that one request would write and another one holds too.
            RequestTooLongError: more tokens than the cache allows a request.
        """
        self._check_own(plan)
        count, batch = static_count("num_query_tokens", num_query_tokens, 1), plan.batch
        active = batch.query_lens > 0
        if (totals := batch.context_lens + batch.query_lens)[active].max(initial=0) + count > (
            most := self.config.cache.max_request_tokens
        ):
            raise RequestTooLongError(f"num_query_tokens: got {count} after {totals.max()}, want at most {most} in all")
        if (room := self.num_steps_ahead(plan)) < count:
            raise InvalidArgumentError(
                f"num_query_tokens: got {count}, want at most {room}, for which the requests have blocks"
            )
        lens = np.where(active, count, 0).astype(np.int32)
        return self._plan(dataclasses.replace(batch, context_lens=totals, query_lens=lens))

    def _room(self, plan: ExecutionPlan) -> np.ndarray:
        batch = plan.batch
        held = (batch.block_tables >= 0).sum(axis=1) * self.config.cache.block_size
        active = batch.query_lens > 0
        return (held - batch.context_lens - batch.query_lens)[active]
