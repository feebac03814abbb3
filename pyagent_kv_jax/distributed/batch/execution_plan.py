"""From a batch of requests to arrays of a few fixed shapes, on the host and once for all layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.distributed.batch.batch_metadata import BatchMetadata
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase
from pyagent_kv_jax.distributed.batch.memory import step_bytes
from pyagent_kv_jax.distributed.batch.placement import placed
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.errors import InvalidArgumentError, TooManyRequestsError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["meta", "own_tokens", "batch"],
    meta_fields=["config", "num_rows", "num_tokens"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class ExecutionPlan:
    """A batch, ready to run on every layer. Immutable; plans of the same static fields run on one compiled program.

    Attributes:
        meta: of the padded batch against the cache, replicated on the mesh. Counts the tokens of all ranks.
        own_tokens: of the same batch against nothing but its own tokens, see ``attend_to_own_tokens``; None: the batch
            is attended against the cache.
        batch: on the host, not padded.
        config: static.
        num_rows: static, R of ``meta``.
        num_tokens: static, T of ``meta``: tokens of the q, k and v the plan runs with.
    """

    meta: AttentionMetadata
    own_tokens: AttentionMetadata | None
    batch: BatchMetadata
    config: DCPPlanConfig
    num_rows: int
    num_tokens: int

    @property
    def phase(self) -> BatchPhase:
        """Of the batch."""
        return self.batch.phase

    @property
    def has_context(self) -> bool:
        """Whether the cache is read at all; of global lengths, so that no rank skips what others wait in."""
        return self.own_tokens is None


def make_plan(config: DCPPlanConfig, batch: BatchMetadata, *, skip_context: bool = True) -> ExecutionPlan:
    """Pad ``batch`` and work out where each token stands. All host work of a step, and all that can be refused.

    What is refused depends on the arguments alone, which are the same in every process: none is left waiting in a
    collective that another one never enters.

    Args:
        config: of the plan.
        batch: of a cache of ``config.cache``.
        skip_context: static; whether a batch without context attends to its own tokens alone.

    Raises:
        TooManyRequestsError: more requests than the last row bucket.
        InvalidArgumentError: more tokens than the last token bucket, or more bytes than the memory budget.
        InvalidBlockError: a block that one request writes and another one holds too.
    """
    has_context = batch.has_context or not skip_context
    check_budgets(config, batch, has_context=has_context)
    batch.check_writers(config.cache)
    one_each = batch.is_one_token_each
    num_rows, num_tokens = config.padded_sizes(batch.num_requests, batch.num_tokens, one_each)
    rows = np.full(num_tokens, -1, np.int32)  # the request of each token
    rows[: batch.num_tokens] = np.repeat(np.arange(batch.num_requests, dtype=np.int32), batch.query_lens)
    starts = np.zeros(num_rows + 1, np.int32)
    starts[1 : batch.num_requests + 1] = np.cumsum(batch.query_lens)
    starts[batch.num_requests + 1 :] = batch.num_tokens  # padded rows repeat the last one
    index = np.where(rows >= 0, np.arange(num_tokens, dtype=np.int32) - starts[rows], 0)  # of a token in its row
    layout = _Layout(rows, index, None if one_each else starts, num_rows, 1 if one_each else num_tokens)
    # With one context rank the pages hold all there is, and nothing is exchanged anyway.
    alone = config.sharding.context_size > 1 and not has_context
    own = _own_tokens(config, batch, layout) if alone else None
    arrays = (_against_cache(config, batch, layout), own)
    meta, own = jax.tree.map(lambda array: placed(array, config.sharding.replicated), arrays)
    return ExecutionPlan(meta, own, batch, config, num_rows, num_tokens)


def check_budgets(config: DCPPlanConfig, batch: BatchMetadata, *, has_context: bool) -> None:
    """Raise ``TooManyRequestsError`` or ``InvalidArgumentError`` as ``make_plan`` does."""
    if batch.num_requests > config.row_buckets[-1]:
        raise TooManyRequestsError(f"batch: got {batch.num_requests} requests, want at most {config.row_buckets[-1]}")
    if batch.num_tokens > config.token_buckets[-1]:
        raise InvalidArgumentError(f"batch: got {batch.num_tokens} tokens, want at most {config.token_buckets[-1]}")
    if config.memory_budget is not None:
        sizes = config.padded_sizes(batch.num_requests, batch.num_tokens, batch.is_one_token_each)
        needed = step_bytes(config, *sizes, has_context=has_context)
        if needed > config.memory_budget:
            raise InvalidArgumentError(
                f"batch: got {batch.num_tokens} tokens of {batch.num_requests} requests, which take {needed} bytes on "
                f"a device, want at most {config.memory_budget}"
            )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which token of a padded batch is whose."""

    rows: np.ndarray  # i32[T], padding -1
    index: np.ndarray  # i32[T], place of the token among those of its row
    query_start_loc: np.ndarray | None
    num_rows: int
    max_query_len: int

    def metadata(
        self, tables: np.ndarray, context: np.ndarray, lens: np.ndarray, block_size: int, max_kv_len: int
    ) -> AttentionMetadata:
        """Of tables i32[R, W], context and new tokens i32[R] of each row, all padded."""
        positions = np.where(self.rows >= 0, context[self.rows] + self.index, 0).astype(np.int32)
        blocks = tables[self.rows, positions // block_size]
        slots = np.where(self.rows >= 0, blocks * block_size + positions % block_size, -1).astype(np.int32)
        arrays: dict[str, Any] = {
            "block_tables": tables,
            "kv_lens": np.where(lens > 0, context + lens, 0).astype(np.int32),
            "query_start_loc": self.query_start_loc,
            "slot_mapping": slots,
            "positions": positions,
            "ok": np.ones(self.num_rows, bool),
        }
        return AttentionMetadata(**arrays, max_query_len=self.max_query_len, max_kv_len=max_kv_len)


def _against_cache(config: DCPPlanConfig, batch: BatchMetadata, layout: _Layout) -> AttentionMetadata:
    context, lens = (_padded(lengths, layout.num_rows, 0) for lengths in (batch.context_lens, batch.query_lens))
    tables, block_size = _padded(batch.block_tables, layout.num_rows, -1), config.cache.block_size
    return layout.metadata(tables, context, lens, block_size, tables.shape[1] * block_size)


def _own_tokens(config: DCPPlanConfig, batch: BatchMetadata, layout: _Layout) -> AttentionMetadata:
    """Each request's tokens from the start of a page of their own, pages in order."""
    page, num_tokens = config.sharding.on_rank(config.cache).page_size, len(layout.rows)
    lens = _padded(batch.query_lens, layout.num_rows, 0)
    pages = -(-lens // page)
    columns = np.arange(-(-layout.max_query_len // page), dtype=np.int32)
    tables = np.where(columns < pages[:, None], (np.cumsum(pages) - pages)[:, None] + columns, -1).astype(np.int32)
    return layout.metadata(tables, np.zeros_like(lens), lens, page, num_tokens)


def _padded(values: np.ndarray, num_rows: int, fill: int) -> np.ndarray:
    out = np.full((num_rows, *values.shape[1:]), fill, np.int32)
    out[: len(values)] = values
    return out
