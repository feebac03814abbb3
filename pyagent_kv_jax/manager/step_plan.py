"""What a scheduler gets back from one step of the manager, and what its callbacks are told."""

from __future__ import annotations

import dataclasses

import numpy as np

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.errors import CallbackError


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Outcome of ``KVCacheManager.step``, all of it on the host.

    Attributes:
        request_ids: as they were given.
        ok: bool[n], whether each request got its blocks. A refused one holds what it held before.
        num_tokens: i32[n], new tokens granted: what was asked for, or 0 where refused.
        metadata: of numpy arrays, ready to be passed to a jitted step. Row i is the i-th request; rows and tokens are
            padded to the sizes asked for. Tokens of the granted requests stand one after another.
        callback_errors: what memory-pressure callbacks raised during this step.
    """

    request_ids: tuple[str, ...]
    ok: np.ndarray
    num_tokens: np.ndarray
    metadata: AttentionMetadata
    callback_errors: tuple[CallbackError, ...] = ()


@dataclasses.dataclass(frozen=True)
class MemoryPressure:
    """What a memory-pressure callback is told.

    Attributes:
        request_ids: requests that were refused for lack of blocks, most urgent first.
        num_blocks_needed: blocks that would have served them.
        num_blocks_free: blocks free now.
    """

    request_ids: tuple[str, ...]
    num_blocks_needed: int
    num_blocks_free: int
