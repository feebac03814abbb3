"""What the attention of one layer exchanges between the ranks of the context axis, by hand."""

from __future__ import annotations

from typing import NamedTuple

from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.combine import Combine


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
        op: as XLA calls it.
        result_bytes: of its result on one rank.
        received_bytes: what a rank receives from others by it; an all-reduce counted as a ring.
    """

    op: str
    result_bytes: int
    received_bytes: int


def collectives_of(config: DCPPlanConfig, num_tokens: int, *, has_context: bool) -> tuple[Collective, ...]:
    """The collectives of ``run`` for one layer and T tokens (padding included), sizes as in ``step_bytes``.

    None where there is one context rank or no context. Else, with ``S = T * H`` states::

        ALL_TO_ALL      all-gather S * d * s, all-to-all S * (dv * s + 4)
        REDUCE_SCATTER  all-gather S * d * s, all-gather C * S * 4, reduce-scatter S / C * dv * 4
        ALL_REDUCE      as ``AllReduceStrategy`` says, of states of (dv + 1) * 4 bytes
    """
    size = config.sharding.context_size
    if size == 1 or not has_context:
        return ()
    itemsize, d, dv = config.activation_dtype.itemsize, config.cache.head_dim, config.cache.value_head_dim
    states = num_tokens * config.heads_attended

    def spread(op: str, result: int) -> Collective:  # of whose result one part in C was there before
        return Collective(op, result, result * (size - 1) // size)

    if config.combine is Combine.ALL_REDUCE:
        return _all_reduce(config.sharding.strategy, states, (dv + 1) * 4, size)
    gathered_q = spread("all-gather", states * d * itemsize)
    if config.combine is Combine.ALL_TO_ALL:
        return gathered_q, spread("all-to-all", states * (dv * itemsize + 4))
    scattered = states // size * dv * 4
    return (
        gathered_q,
        spread("all-gather", size * states * 4),
        Collective("reduce-scatter", scattered, scattered * (size - 1)),
    )


def received_bytes(config: DCPPlanConfig, num_tokens: int, *, has_context: bool) -> int:
    """Bytes that one rank receives in one ``run``."""
    return sum(one.received_bytes for one in collectives_of(config, num_tokens, has_context=has_context))


def _all_reduce(strategy: AllReduceStrategy, states: int, state_bytes: int, size: int) -> tuple[Collective, ...]:
    """See ``all_reduce_states``: sizes that do not divide are padded."""
    if strategy is AllReduceStrategy.NCCL:
        sums = (states * 4, states * state_bytes)  # of the highest LSEs, of weighted outputs and weights
        return tuple(Collective("all-reduce", total, 2 * total * (size - 1) // size) for total in sums)
    power = 1 << (size.bit_length() - 1)
    steps, folds = power.bit_length() - 1, 2 if size > power else 0
    if strategy is AllReduceStrategy.RING:
        sends = [-(-states // size) * state_bytes] * (2 * (size - 1))
    elif strategy is AllReduceStrategy.TREE:
        sends = [states * state_bytes] * (steps + folds)
    else:
        padded = -(-states // power) * power * state_bytes
        sends = [padded] * folds + [padded >> step for step in range(1, steps + 1)] * 2
    return tuple(Collective("collective-permute", sent, sent) for sent in sends)
