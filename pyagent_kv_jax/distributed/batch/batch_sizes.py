"""How a list of requests becomes batches that fit: in order, whole where they fit, else in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase, BatchRequest
from pyagent_kv_jax.distributed.batch.memory import step_bytes
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.errors import ConfigError, DuplicateRequestError


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """What the cost of a batch depends on.

    Attributes:
        num_rows: requests.
        num_tokens: of all of them.
        is_one_token_each: whether each request brings exactly one.
        has_context: whether one that takes part has tokens from before.
    """

    num_rows: int = 0
    num_tokens: int = 0
    is_one_token_each: bool = True
    has_context: bool = False

    def with_request(self, num_query_tokens: int, num_context_tokens: int) -> BatchSize:
        """With one request more."""
        return BatchSize(
            self.num_rows + 1,
            self.num_tokens + num_query_tokens,
            self.is_one_token_each and num_query_tokens == 1,
            self.has_context or (num_query_tokens > 0 and num_context_tokens > 0),
        )

    def bytes_needed(self, config: DCPPlanConfig) -> int:
        """By ``step_bytes``, padded; of a batch within the last buckets."""
        sizes = config.padded_sizes(self.num_rows, self.num_tokens, self.is_one_token_each)
        return step_bytes(config, *sizes, has_context=self.has_context)

    def fits(self, config: DCPPlanConfig) -> bool:
        """Whether ``make_plan`` takes a batch of this size."""
        if self.num_rows > config.row_buckets[-1] or self.num_tokens > config.token_buckets[-1]:
            return False
        return config.memory_budget is None or self.bytes_needed(config) <= config.memory_budget


def split_requests(requests: Sequence[BatchRequest], config: DCPPlanConfig) -> list[list[BatchRequest]]:
    """``requests`` in batches that fit ``config``'s buckets and memory budget, first come, first served.

    Batches run one after another hold every token once and in order. A request that fits no batch of its own is cut
    into chunks of as many tokens as fit, one a batch, of which the last may share its batch with those that follow:
    what a chunk attends to, the ones before it have written.

    Raises:
        DuplicateRequestError: one id twice; only chunks of one request may share an id, and never a batch.
        ConfigError: not even one token of a request fits the memory budget.
    """
    ids = [request.request_id for request in requests]
    if len(set(ids)) < len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise DuplicateRequestError(f"request_id: got {twice!r} twice, want each once")
    batches: list[list[BatchRequest]] = []
    size = BatchSize()
    for request in requests:
        for chunk in _chunks(request, config):
            grown = size.with_request(chunk.num_query_tokens, chunk.num_context_tokens)
            # Chunks of one request never meet: all but the last are as large as fits, and the last follows one.
            apart = not batches or batches[-1][-1].request_id == chunk.request_id
            if apart or not grown.fits(config):
                batches.append([])
                grown = BatchSize().with_request(chunk.num_query_tokens, chunk.num_context_tokens)
            batches[-1].append(chunk)
            size = grown
    return batches


def _chunks(request: BatchRequest, config: DCPPlanConfig) -> list[BatchRequest]:
    """The request, or where that fits no batch of its own, its tokens in parts that do."""
    chunks: list[BatchRequest] = []
    phase = BatchPhase.DECODE if request.is_decode else BatchPhase.PREFILL  # not what one chunk alone looks like
    context, left = request.num_context_tokens, request.num_query_tokens
    while left or not chunks:
        count = _most_tokens(request, left, context, config)
        if count == request.num_query_tokens:
            return [request]
        chunks.append(dataclasses.replace(request, num_query_tokens=count, num_context_tokens=context, phase=phase))
        context, left = context + count, left - count
    return chunks


def _most_tokens(request: BatchRequest, wanted: int, context: int, config: DCPPlanConfig) -> int:
    """Most of ``wanted`` tokens after ``context`` that fit a batch of their own; 0 only if none is wanted."""
    # Costs change with the bucket alone, so a full bucket is the only size worth trying beside all and one.
    for count in (wanted, *(size for size in reversed(config.token_buckets) if size < wanted), min(wanted, 1)):
        if BatchSize().with_request(count, context).fits(config):
            return count
    least = min(wanted, 1)
    needed = BatchSize().with_request(least, context).bytes_needed(config)
    raise ConfigError(
        f"memory_budget: got {config.memory_budget} bytes, want at least {needed} for a batch of request "
        f"{request.request_id!r} with {least} of its tokens"
    )
