"""What a scheduler gets back from one step of the manager, and what it can ask ahead of one."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.errors import CallbackError


@dataclasses.dataclass(frozen=True)
class AdmissionPreview:
    """What the step would find that admits all known tokens of a request which holds no blocks.

    Attributes:
        num_cached_tokens: that it would not compute: found in the prefix cache, or brought back from host memory.
        num_blocks: that it would take from the free ones, over all layer groups: new ones, and cached ones that nobody
            holds.
    """

    num_cached_tokens: int
    num_blocks: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Outcome of ``KVCacheManager.step``, all of it on the host.

    Attributes:
        request_ids: as they were given.
        ok: bool[n], whether each request got its blocks. A refused one holds what it held before.
        num_tokens: i32[n], new tokens granted: what was asked for, or 0 where refused. Less for a request of known
            tokens that this step admitted, where cached ones leave less to compute.
        metadata: of numpy arrays, ready to be passed to a jitted step. Row i is the i-th request; rows and tokens are
            padded to the sizes asked for. Tokens of the granted requests stand one after another.
        num_cached_tokens: i32[n], leading tokens of a request that this step admitted that are not to be computed:
            found in the prefix cache, or brought back from host memory. 0 for requests that held blocks before.
        callback_errors: what memory-pressure callbacks raised during this step.
    """

    request_ids: tuple[str, ...]
    ok: np.ndarray
    num_tokens: np.ndarray
    metadata: AttentionMetadata
    num_cached_tokens: np.ndarray
    callback_errors: tuple[CallbackError, ...] = ()

    def with_errors(self, errors: tuple[CallbackError, ...]) -> Self:
        """The same plan, and what callbacks raised."""
        return dataclasses.replace(self, callback_errors=errors)
