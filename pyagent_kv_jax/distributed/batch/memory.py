"""Bytes that a step takes on one device, beside weights and cache."""

from __future__ import annotations

from pyagent_kv_jax.distributed.batch.own_tokens import queries_a_head
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.combine import Combine


def step_bytes(config: DCPPlanConfig, num_rows: int, num_tokens: int, *, has_context: bool) -> int:
    """Most bytes alive at once for the attention of R rows and T tokens on one device.

    With C context and t tensor ranks, s bytes an element of q, ``H = q_heads / t`` heads to attend with, of which a
    rank owns h (``H / C`` where heads are scattered, else H), and N KV heads on the rank::

        tables    4 * (R * (W + 3) + 2 * T)
        own       T * (h * d * s + N * (d + dv) * s + h * (dv * s + 4))         q, k, v, out and LSE
        gathered  T * H * d * s                                                 q of all heads; unless ALL_REDUCE
        partial   T * H * (dv * s + 4)                                          out and LSE of the rank's share
        combine   2 * T * H * (dv * s + 4)                                      ALL_TO_ALL: sent and received
                  T * H * dv * 4 + C * T * H * 4                                REDUCE_SCATTER: rescaled, all LSEs
                  2 * T * H * (dv + 1) * 4                                      ALL_REDUCE: sent and received

    Of a batch without context on several context ranks, instead of the last three::

        scratch   (T // page + R) * N' * page * (d + dv) as stored              N': KV heads that the h heads read

    Kernels' own tiles are not counted: they do not grow with the batch.
    """
    cache, sharding = config.cache, config.sharding
    on_rank, itemsize = sharding.on_rank(cache), config.activation_dtype.itemsize
    d, dv, attended, owned = cache.head_dim, cache.value_head_dim, config.heads_attended, config.heads_owned
    width = -(-cache.max_model_len // cache.block_size)
    total = 4 * (num_rows * (width + 3) + 2 * num_tokens)
    total += num_tokens * (owned * (d * itemsize + dv * itemsize + 4) + on_rank.num_heads * (d + dv) * itemsize)
    if sharding.context_size == 1:
        return total
    if not has_context:
        heads = owned // queries_a_head(owned, attended // on_rank.num_heads)
        stored = (cache.storage_head_dim(d) + cache.storage_head_dim(dv)) * cache.kv_dtype.itemsize
        return total + (num_tokens // on_rank.page_size + num_rows) * heads * on_rank.page_size * stored
    states = num_tokens * attended
    total += states * (dv * itemsize + 4)
    if config.combine is Combine.ALL_REDUCE:
        return total + 2 * states * (dv + 1) * 4
    total += states * d * itemsize
    if config.combine is Combine.ALL_TO_ALL:
        return total + 2 * states * (dv * itemsize + 4)
    return total + states * dv * 4 + sharding.context_size * states * 4
