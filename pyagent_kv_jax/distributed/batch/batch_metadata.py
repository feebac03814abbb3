"""A batch of requests as arrays, before anything is padded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Self

import jax
import numpy as np

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase, BatchRequest
from pyagent_kv_jax.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    InvalidBlockError,
    RequestTooLongError,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_tables", "query_lens", "context_lens"],
    meta_fields=["phase"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class BatchMetadata:
    """R requests of a batch, one a row, on the host. Lengths and blocks are those of the whole cache, not a rank's.

    Attributes:
        block_tables: i32[R, W], block ids, padding -1; W is what the longest request the cache allows takes.
        query_lens: i32[R], tokens of this step.
        context_lens: i32[R], tokens computed before.
        phase: static.
    """

    block_tables: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    phase: BatchPhase

    @classmethod
    def from_requests(cls, requests: Sequence[BatchRequest], config: KVCacheConfig) -> Self:
        """The arrays of ``requests``, in their order, for a cache of ``config``.

        Raises:
            InvalidArgumentError: no requests, or blocks missing for a request's tokens.
            DuplicateRequestError: one id twice.
            RequestTooLongError: more tokens than ``config.max_request_tokens``.
            InvalidBlockError: a block id outside the pool, or more blocks than a row of the table holds.
        """
        if not requests:
            raise InvalidArgumentError("requests: got none, want at least one")
        seen: set[str] = set()
        width = math.ceil(config.max_model_len / config.block_size)
        for request in requests:
            if request.request_id in seen:
                raise DuplicateRequestError(f"request_id: got {request.request_id!r} twice, want each once in a batch")
            seen.add(request.request_id)
            _check_blocks(request, config, width)
        tables = np.full((len(requests), width), -1, np.int32)
        for row, request in enumerate(requests):
            tables[row, : len(request.block_ids)] = request.block_ids
        return cls(
            tables,
            np.array([request.num_query_tokens for request in requests], np.int32),
            np.array([request.num_context_tokens for request in requests], np.int32),
            _phase_of(requests),
        )

    @property
    def is_prefill(self) -> bool:
        """Whether all requests are of PREFILL."""
        return self.phase is BatchPhase.PREFILL

    @property
    def is_decode(self) -> bool:
        """Whether all requests are of DECODE."""
        return self.phase is BatchPhase.DECODE

    @property
    def num_requests(self) -> int:
        """R."""
        return self.query_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of this step, of all requests."""
        return int(self.query_lens.sum())

    @property
    def has_context(self) -> bool:
        """Whether any request that takes part has tokens from before. Of global lengths: the same on every rank."""
        return bool(self.context_lens[self.query_lens > 0].any())

    @property
    def is_one_token_each(self) -> bool:
        """Whether token i of the batch is that of request i."""
        return bool((self.query_lens == 1).all())

    def check_writers(self, config: KVCacheConfig) -> None:
        """Raise ``InvalidBlockError`` where a request writes into a block that another one holds tokens in.

        Blocks that nobody writes may be shared.
        """
        columns = np.arange(self.block_tables.shape[1])
        first = (self.context_lens // config.block_size)[:, None]
        end = -(-(self.context_lens + self.query_lens) // config.block_size)[:, None]
        held = (self.query_lens > 0)[:, None] & (columns < end)
        rows, at = np.nonzero(held & (columns >= first))
        writers = np.zeros(config.pool_blocks, np.int32)  # request + 1; memory that is not touched costs nothing
        writers[self.block_tables[rows, at]] = rows + 1
        rows, at = np.nonzero(held)
        writer = writers[self.block_tables[rows, at]]
        clashes = np.flatnonzero((writer > 0) & (writer != rows + 1))
        if clashes.size:
            row, column = rows[clashes[0]], at[clashes[0]]
            raise InvalidBlockError(
                f"block {self.block_tables[row, column]}: got request {writer[clashes[0]] - 1} of the batch that "
                f"writes into it and request {row} that has tokens in it too, want a copy for each"
            )


def _phase_of(requests: Sequence[BatchRequest]) -> BatchPhase:
    kinds = {request.is_decode for request in requests if request.num_query_tokens}
    if len(kinds) > 1:
        return BatchPhase.MIXED
    return BatchPhase.DECODE if kinds == {True} else BatchPhase.PREFILL


def _check_blocks(request: BatchRequest, config: KVCacheConfig, width: int) -> None:
    name, blocks = f"request {request.request_id!r}", request.block_ids
    if request.num_tokens > config.max_request_tokens:
        raise RequestTooLongError(f"{name}: got {request.num_tokens} tokens, want at most {config.max_request_tokens}")
    needed = math.ceil(request.num_tokens / config.block_size)
    if len(blocks) < needed:
        raise InvalidArgumentError(
            f"{name}: got {len(blocks)} blocks, want {needed} for {request.num_tokens} tokens in blocks of "
            f"{config.block_size}"
        )
    if len(blocks) > width:
        raise InvalidBlockError(f"{name}: got {len(blocks)} blocks, want at most {width}, the width of a table")
    if (highest := int(blocks.max(initial=0))) >= config.pool_blocks:
        raise InvalidBlockError(f"{name}: got block {highest}, want ids below {config.pool_blocks}")
