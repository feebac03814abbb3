"""Mixed batches of any size through one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from pyagent_kv_jax.distributed.batch.batch_executor import MeshBatchExecutor
from pyagent_kv_jax.distributed.batch.batch_metadata import BatchMetadata
from pyagent_kv_jax.distributed.batch.batch_request import BatchRequest
from pyagent_kv_jax.distributed.batch.batch_sizes import split_requests
from pyagent_kv_jax.distributed.batch.batch_stats import BatchStats
from pyagent_kv_jax.distributed.batch.execution_plan import ExecutionPlan
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.batch.planned_attention import BatchOutput
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages


class UnifiedBatchWrapper:
    """Prompts and decode together, in as many batches as rows, tokens and memory want, see ``split_requests``.

    No request is dropped or put off, and nothing is moved out of the cache to make room: what does not fit at once is
    computed one batch after another within the call, which comes to the same.
    """

    def __init__(self, config: DCPPlanConfig) -> None:
        self.config = config
        self._executor = MeshBatchExecutor(config)

    def plan(self, requests: Sequence[BatchRequest]) -> tuple[ExecutionPlan, ...]:
        """Plans of ``requests``, to be run one after another on each layer.

        Raises:
            ConfigError: not even one token of a request fits the memory budget.
            InvalidArgumentError, DuplicateRequestError, RequestTooLongError, InvalidBlockError: as
                ``MeshBatchExecutor.plan``; nothing is planned then.
        """
        whole = BatchMetadata.from_requests(requests, self.config.cache)
        whole.check_writers(self.config.cache)  # across batches too
        return tuple(self._executor.plan(batch) for batch in split_requests(requests, self.config))

    def run(
        self,
        plans: Sequence[ExecutionPlan],
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """``plans`` on one layer; arrays, result and errors as for ``process_batch``."""
        return self._executor.run_ragged(plans, pages, layer, q, k, v, **options)

    def process_batch(
        self,
        requests: Sequence[BatchRequest],
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """``plan`` and ``run``: attention of all ``requests`` on one layer. Of many layers, plan once and ``run`` each.

        Args:
            requests: of any phase.
            pages: donated.
            layer: of the model.
            q: [N, q_heads, head_dim], the requests' tokens one after another, N no less than their number.
            k: [N, num_heads, head_dim].
            v: [N, num_heads, v_head_dim].
            **options: as for ``MeshBatchExecutor.run``.

        Returns:
            out and LSE in the order of q; past the requests' tokens 0 and -inf; the new pages.

        Raises:
            As ``plan`` and ``MeshBatchExecutor.run``, before anything has changed.
        """
        return self.run(self.plan(requests), pages, layer, q, k, v, **options)

    def get_stats(self) -> BatchStats:
        """A copy of the counts so far; each batch that requests were split into counts as one."""
        return self._executor.get_stats()
