"""One request's part of a batch, as whoever keeps the blocks knows it."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any

import numpy as np

from pyagent_kv_jax.arguments import integers, is_count
from pyagent_kv_jax.errors import InvalidArgumentError, InvalidBlockError


class BatchPhase(StrEnum):
    """What a batch does: read prompts, add tokens to sequences under way, or both at once."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclasses.dataclass(frozen=True, eq=False)
class BatchRequest:
    """Tokens that a request brings to a step, and the blocks that hold them and all before them.

    Attributes:
        request_id: unique within a batch.
        block_ids: of the whole sequence, in order; enough for all its tokens after the step. More are blocks reserved
            ahead. Given as any sequence of integers, kept as i32[n].
        num_query_tokens: tokens of this step. 0: the request takes no part.
        num_context_tokens: tokens computed before, whose K and V are in the blocks.
        phase: PREFILL or DECODE. None: DECODE if one token follows some context, else PREFILL; then either wrapper
            takes it, for the last token of a chunked prompt looks just like one of decode.

    Raises:
        InvalidArgumentError: a count that is no integer of 0 or more, an id that is no text or empty, phase MIXED.
        ShapeMismatchError: block ids that are no flat list of integers.
        InvalidBlockError: a negative block id, or one named twice.
    """

    request_id: str
    block_ids: Any
    num_query_tokens: int
    num_context_tokens: int = 0
    phase: BatchPhase | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id:
            raise InvalidArgumentError(f"request_id: got {self.request_id!r}, want a string that is not empty")
        for name in ("num_query_tokens", "num_context_tokens"):
            if not is_count(getattr(self, name)):
                raise InvalidArgumentError(
                    f"request {self.request_id!r}: {name}: got {getattr(self, name)!r}, want an integer of 0 or more"
                )
        if self.phase not in (None, BatchPhase.PREFILL, BatchPhase.DECODE):
            raise InvalidArgumentError(
                f"request {self.request_id!r}: phase: got {self.phase!r}, want 'prefill', 'decode' or None"
            )
        blocks = np.array(integers(f"request {self.request_id!r}: block_ids", self.block_ids))
        in_order = np.sort(blocks)
        if (in_order[:1] < 0).any():
            raise InvalidBlockError(f"request {self.request_id!r}: block_ids: got {in_order[0]}, want ids from 0 on")
        if (again := in_order[1:][in_order[1:] == in_order[:-1]]).size:
            raise InvalidBlockError(f"request {self.request_id!r}: block_ids: got {again[0]} twice, want each once")
        blocks.flags.writeable = False
        object.__setattr__(self, "block_ids", blocks)
        object.__setattr__(self, "num_query_tokens", int(self.num_query_tokens))
        object.__setattr__(self, "num_context_tokens", int(self.num_context_tokens))
        object.__setattr__(self, "phase", None if self.phase is None else BatchPhase(self.phase))

    @property
    def is_decode(self) -> bool:
        """``phase``, resolved."""
        if self.phase is None:
            return self.num_query_tokens == 1 and self.num_context_tokens > 0
        return self.phase is BatchPhase.DECODE

    @property
    def num_tokens(self) -> int:
        """Of the sequence, after the step."""
        return self.num_context_tokens + self.num_query_tokens
