"""Counts of what an executor did."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class BatchStats:
    """Since the executor was made.

    Attributes:
        num_plans: batches planned.
        num_runs: layers of batches attended.
        num_compilations: programs compiled for them; executors of one config share programs.
        num_tokens: tokens planned.
        num_padded_tokens: rows of q beside them in the padded batches.
        num_layer_tokens: tokens attended, each counted once a layer.
        bytes_exchanged: received by one rank from others, by ``collectives_of``.
    """

    num_plans: int = 0
    num_runs: int = 0
    num_compilations: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_layer_tokens: int = 0
    bytes_exchanged: int = 0
