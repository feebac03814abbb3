"""Bytes that a step takes on one device, beside weights and cache."""

from __future__ import annotations

from pyagent_kv_jax.distributed.batch.own_tokens import queries_a_head
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.combine import Combine


def step_bytes(config: DCPPlanConfig, num_rows: int, num_tokens: int, *, has_context: bool) -> int:
    """Most bytes alive at once for the attention of R rows and T tokens on one device.

    With C context and t tensor ranks, s bytes an element of q, ``H = q_heads / t`` heads to attend with, of which a
    rank owns h (``H / C`` where heads are scattered, else H), and N KV heads on the rank: the sum of ::

        tables    4 * (R * (W + 3) + 2 * T)
        own       T * (h * d * s + N * (d + dv) * s + h * (dv * s + 4))         q, k, v, out and LSE
        partial   T * H * (dv * s + 4)                                          out and LSE of the rank's share

    and the greater of attention, ``gathered + kernel``, and ``combine`` after it::

        gathered  T * H * d * s                                                 q of all heads; not for ALL_REDUCE
        kernel    T * H * ((d + dv) * 4 + 4)                                    its q, out and LSE in float32
        combine   2 * T * H * (dv * s + 4)                                      ALL_TO_ALL: sent and received
                  T * H * dv * 4 + C * T * H * 4                                REDUCE_SCATTER: rescaled, all LSEs
                  2 * T * H * (dv + 1) * 4                                      ALL_REDUCE: sent and received

    With one context rank only ``kernel`` is left beside tables and own. Of a batch without context on several, this::

        kernel    T * h * ((d + dv) * 4 + 4)
        scratch   (T // page + R) * N' * page * (d + dv) as stored              N': KV heads that the h heads read
        tables    4 * (R * ceil(T / page) + 2 * T)                              into the scratch pages

    Kernels that keep no q and output of their own need less; their tiles are not counted, for they do not grow with the
    batch.
    """
    cache, sharding, dtype = config.cache, config.sharding, config.activation_dtype
    on_rank, d, dv = sharding.on_rank(cache), cache.head_dim, cache.value_head_dim
    attended, owned = config.heads_attended, config.heads_owned
    out = dv * dtype.itemsize + 4  # and LSE, of one head of one token
    width = -(-cache.max_model_len // cache.block_size)
    total = 4 * (num_rows * (width + 3) + 2 * num_tokens)
    total += num_tokens * (owned * (d * dtype.itemsize + out) + on_rank.num_heads * (d + dv) * dtype.itemsize)
    kernel = (d + dv) * 4 + 4
    if sharding.context_size == 1:
        return total + num_tokens * attended * kernel
    if not has_context:
        page, heads = on_rank.page_size, owned // queries_a_head(owned, attended // on_rank.num_heads)
        stored = (cache.storage_head_dim(d) + cache.storage_head_dim(dv)) * cache.kv_dtype.itemsize
        scratch = (num_tokens // page + num_rows) * heads * page * stored
        return total + num_tokens * owned * kernel + scratch + 4 * (num_rows * -(-num_tokens // page) + 2 * num_tokens)
    combine = {
        Combine.ALL_TO_ALL: 2 * out,
        Combine.REDUCE_SCATTER: dv * 4 + sharding.context_size * 4,
        Combine.ALL_REDUCE: 2 * (dv + 1) * 4,
    }[config.combine]
    gathered = d * dtype.itemsize if config.scatters_heads else 0
    return total + num_tokens * attended * (out + max(gathered + kernel, combine))
