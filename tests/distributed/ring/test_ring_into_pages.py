"""Prefill in a ring, straight into a cache that spreads its tokens otherwise, and a decode step from there."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.cache import AttentionMetadata, KVPages
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.all_reduce import all_reduce_states
from pyagent_kv_jax.distributed.ring.ring_attention import ring_attention_on_rank
from pyagent_kv_jax.distributed.ring.zigzag import zigzag_shard, zigzag_unshard
from pyagent_kv_jax.tables import ContextParallel, local_slots
from tests.distributed.meshes import cpu_mesh
from tests.distributed.ring.test_ring_attention import BATCH, DIM, KV_HEADS, V_DIM, assert_close, attention, inputs

SIZE, WHOLE = 3, 12  # ranks; tokens of a block on all of them
LENS = np.array([12, 7, 1], np.int32)
TABLES = np.array([[5, 0], [2, 7], [6, 1]], np.int32)  # the second block is for what is decoded
CONFIG = KVCacheConfig(
    1, KV_HEADS, DIM, v_head_dim=V_DIM, num_blocks=8, block_size=WHOLE // SIZE, dtype="float32", device="cpu"
)


def slots_of(positions: Any) -> Any:
    """i32[batch, n] of whole blocks."""
    column = jnp.broadcast_to(positions // WHOLE, (BATCH, positions.shape[-1]))
    return jnp.take_along_axis(jnp.asarray(TABLES), column, axis=1) * WHOLE + positions % WHOLE


def here() -> ContextParallel:
    return ContextParallel(SIZE, jax.lax.axis_index("ring"), 2)


def prefill(q: Any, k: Any, v: Any) -> Any:
    def write(pages: KVPages, k: Any, v: Any, positions: Any) -> KVPages:
        slots = jnp.where(positions < LENS[:, None], slots_of(positions), -1)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return pages.write(0, *flat, local_slots(slots.ravel(), CONFIG.block_size, here()))

    empty = jax.tree.map(lambda x: x * jnp.nan, KVPages.create(CONFIG))
    ring = {"axis_name": "ring", "axis_size": SIZE, "kv_lens": jnp.asarray(LENS)}
    out, _, pages = ring_attention_on_rank(q, k, v, **ring, visit=write, visited=empty)
    return out, pages.k_pages, pages.v_pages


def decode(k_pages: Any, v_pages: Any, q: Any, k: Any, v: Any) -> Any:
    kv_lens = jnp.asarray(LENS) + 1
    slots = slots_of(LENS[:, None])[:, 0]
    meta = AttentionMetadata(jnp.asarray(TABLES), kv_lens, None, slots, kv_lens - 1, kv_lens > 0)
    pages = KVPages(k_pages, v_pages, None, None, CONFIG)
    out, lse, _ = pages.attend_share(0, q, k, v, meta, context_parallel=here())
    return all_reduce_states(out, lse, "ring", SIZE, "tree")


def test_a_cache_is_written_as_keys_and_values_come_by() -> None:
    """No collective but the ring's, though a cache deals out tokens by two where the ring has chunks."""
    q, k, v = inputs(7, WHOLE, LENS)
    q_new, k_new, v_new = (x[:, 0] for x in inputs(8, 1))
    mesh, ring = cpu_mesh(ring=SIZE), P(None, "ring")
    on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=False)
    run = jax.jit(on_mesh(prefill, in_specs=ring, out_specs=(ring, P("ring"), P("ring"))))
    arrays = [jax.device_put(zigzag_shard(x, SIZE), NamedSharding(mesh, ring)) for x in (q, k, v)]
    text = run.lower(*arrays).compile().as_text()
    assert re.findall(r" ((?:all|collective|reduce)-[a-z-]+?)(?:-start)?\(", text) == ["collective-permute"] * 4
    out, *pages = run(*arrays)
    assert_close([zigzag_unshard(out, SIZE)], attention(q, k, v, LENS)[:1])

    step = jax.jit(on_mesh(decode, in_specs=(P("ring"), P("ring"), P(), P(), P()), out_specs=P()))
    out, lse = step(*pages, q_new, k_new, v_new)
    for row, length in enumerate(LENS):
        pairs = (q, q_new), (k, k_new), (v, v_new)
        tokens = (np.concatenate([old[row, :length], new[row][None]])[None] for old, new in pairs)
        want = attention(*tokens)
        assert_close([out[row], lse[row]], [want[0][0, -1], want[1][0, -1]])
