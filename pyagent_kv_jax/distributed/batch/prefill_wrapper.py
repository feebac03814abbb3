"""Prefill of a batch whose context is spread over ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.distributed.batch.batch_executor import MeshBatchExecutor
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase, BatchRequest
from pyagent_kv_jax.distributed.batch.execution_plan import ExecutionPlan
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.batch.planned_attention import BatchOutput
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages
from pyagent_kv_jax.errors import InvalidArgumentError


class ReadyBlocks(NamedTuple):
    """K and V of one request that a decode instance can be handed.

    Attributes:
        request_id: whose.
        block_ids: i32[n], blocks with tokens, in order.
        num_complete: how many of them, the first ones, are full: those that a content hash can name.
        num_tokens: tokens in all of them.
    """

    request_id: str
    block_ids: np.ndarray
    num_complete: int
    num_tokens: int


class BatchDCPPrefillWrapper(MeshBatchExecutor):
    """Prompts, or chunks of them, over a cache spread by token (DCP); leaves K and V ready to be handed on.

    A batch in which no request has context runs without a single collective, see ``attend_to_own_tokens``; one with
    context as ``attend_planned`` says.
    """

    phase: ClassVar[BatchPhase] = BatchPhase.PREFILL

    def __init__(self, config: DCPPlanConfig) -> None:
        super().__init__(config)
        self._progress: weakref.WeakKeyDictionary[ExecutionPlan, _Progress] = weakref.WeakKeyDictionary()

    def plan(self, requests: Sequence[BatchRequest]) -> ExecutionPlan:
        """See ``MeshBatchExecutor.plan``."""
        plan = super().plan(requests)
        self._progress[plan] = _Progress([request.request_id for request in requests], set())
        return plan

    def run(
        self,
        plan: ExecutionPlan,
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """See ``MeshBatchExecutor.run``."""
        output = super().run(plan, pages, layer, q, k, v, **options)
        if plan in self._progress:
            self._progress[plan].layers.add(int(layer))
        return output

    def ready_blocks(self, plan: ExecutionPlan) -> list[ReadyBlocks]:
        """What each request of ``plan`` holds now that it has run on all layers, in the plan's order.

        Raises:
            InvalidArgumentError: a plan that this wrapper did not make, or has not run on every layer yet.
        """
        progress, num_layers = self._progress.get(plan), self.config.cache.num_layers
        if progress is None:
            raise InvalidArgumentError("plan: got one that this wrapper did not make, want one of its own")
        if missing := sorted(set(range(num_layers)) - progress.layers):
            raise InvalidArgumentError(f"plan: got one that has not run on layers {missing}, want all {num_layers}")
        batch, block_size = plan.batch, self.config.cache.block_size
        totals = batch.context_lens + batch.query_lens
        return [
            ReadyBlocks(name, batch.block_tables[row, : -(-total // block_size)], total // block_size, total)
            for row, (name, total) in enumerate(zip(progress.request_ids, totals.tolist(), strict=True))
        ]


class _Progress(NamedTuple):
    request_ids: list[str]
    layers: set[int]
