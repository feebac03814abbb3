"""Causal attention over sequences spread over ranks: K and V go round the ring, queries stay (arXiv 2310.01889)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from pallas_kernels.paged_attention.visibility import Visibility
from pyagent_kv_jax.distributed.all_reduce import check_axis
from pyagent_kv_jax.distributed.on_ranks import on_ranks
from pyagent_kv_jax.distributed.ring.tiles import Pairs, Queries
from pyagent_kv_jax.distributed.ring.zigzag import chunk_length, chunk_pairs, zigzag_positions
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError, is_concrete


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    axis: str,
    tensor_axis: str | None = None,
    batch_axis: str | None = None,
    kv_lens: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    sliding_window: ArrayLike | None = None,
    chunk_size: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal self-attention of a batch of sequences that are sharded over C ranks in zig-zag order.

    Prefill of prompts too long for one device. All that is indexed by token is in zig-zag order (``zigzag_shard``),
    best from the token ids on: token i stands at position ``zigzag_positions(seq, C)[i]``, for rotary embeddings and
    for the slots of a paged cache, into which each rank writes the K and V of its own tokens. For chunks of a prompt
    after a cached context: attend over the context too, and merge both by their LSEs.

    Every rank computes as much as any other, sends K and V on C - 1 times, each time while it computes, and holds those
    of two ranks at a time. For inference: loops here have bounds known at run time only, which reverse mode refuses.

    Args:
        q: floating [batch, seq, q_heads, d]; seq a multiple of 2C.
        k: floating [batch, seq, kv_heads, d]; q_heads a multiple of kv_heads.
        v: floating [batch, seq, kv_heads, dv].
        mesh: to run on.
        axis: name of its axis of C ranks, over which seq is sharded.
        tensor_axis: name of the axis over which heads are sharded; None: none.
        batch_axis: name of the axis over which sequences are sharded; None: none.
        kv_lens: i32[batch], tokens of each sequence; what stands at later positions is padding, not read. None: seq.
        scale: of the logits; None: ``1 / sqrt(d)``.
        sliding_window: i32[], may be traced: a query sees this many tokens, itself included. None: all.
        chunk_size: i32[], may be traced: a query sees its own chunk of so many tokens (Llama 4). None: all.
        logits_soft_cap: ``cap * tanh(logits / cap)``. None: no cap.
        sinks: floating [q_heads], one logit a head that takes weight and gives nothing.
        return_lse: static.

    Returns:
        out [batch, seq, q_heads, dv] of q's dtype, in zig-zag order; with ``return_lse`` (out, lse f32[batch, seq,
        q_heads]), natural log. Computed in float32. Padding: 0 and -inf.

    Raises:
        InvalidArgumentError: an axis that the mesh lacks or that is named twice, lengths outside 0 to seq, a window or
            chunk below 1, a cap that is not above 0.
        ShapeMismatchError: shapes that do not fit each other, or the axes.
    """
    sizes = _axis_sizes(mesh, axis, tensor_axis, batch_axis)
    _check_arrays(q, k, v, sinks)
    chunk_length(q.shape[1], sizes[axis])
    for what, got, name in (("kv_heads", k.shape[2], tensor_axis), ("batch", q.shape[0], batch_axis)):
        if name is not None and got % sizes[name]:
            raise ShapeMismatchError(f"{what}: got {got}, want a multiple of {sizes[name]}, the ranks of {name!r}")
    if kv_lens is not None:
        kv_lens = _checked_lens(kv_lens, *q.shape[:2])
    given = {"scale": scale, "sliding_window": sliding_window, "chunk_size": chunk_size}
    given["logits_soft_cap"] = logits_soft_cap
    numbers = {name: _checked_number(name, value) for name, value in given.items() if value is not None}

    def on_rank(q: Any, k: Any, v: Any, kv_lens: Any, sinks: Any, numbers: Any) -> Any:
        return ring_attention_on_rank(
            q, k, v, axis_name=axis, axis_size=sizes[axis], kv_lens=kv_lens, sinks=sinks, **numbers
        )

    tokens, heads = P(batch_axis, axis, tensor_axis), P(tensor_axis)
    mapped = on_ranks(on_rank, mesh, (tokens, tokens, tokens, P(batch_axis), heads, P()), (tokens, tokens))
    out, lse = mapped(q, k, v, kv_lens, sinks, numbers)
    return (out, lse) if return_lse else out


def ring_attention_on_rank(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: Hashable,
    axis_size: int,
    kv_lens: jax.Array | None = None,
    scale: ArrayLike | None = None,
    sliding_window: ArrayLike | None = None,
    chunk_size: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sinks: jax.Array | None = None,
    visit: Callable[[Any, jax.Array, jax.Array, jax.Array], Any] | None = None,
    visited: Any = None,
) -> Any:
    """``ring_attention`` on one rank, for use inside ``jax.shard_map``: all arrays are this rank's own part.

    Args:
        q: floating [batch, seq / C, q_heads, d]: the rank's early chunk and its late one.
        k: floating [batch, seq / C, kv_heads, d].
        v: floating [batch, seq / C, kv_heads, dv].
        axis_name: of the axis of C ranks.
        axis_size: static, C.
        kv_lens: i32[batch], of whole sequences.
        scale, sliding_window, chunk_size, logits_soft_cap, sinks: as for ``ring_attention``; sinks of these heads.
        visit: ``visited = visit(visited, k, v, positions)``, called for every rank's part as it comes by, with its K, V
            and positions i32[seq / C]: so a cache that spreads tokens in another way than the ring (DCP) is written
            without one more collective, each rank picking out what is its own. What is padding in V is 0.
        visited: what ``visit`` is given first: any pytree, such as the rank's pages.

    Returns:
        (out [batch, seq / C, q_heads, dv] of q's dtype, lse f32[batch, seq / C, q_heads]); and ``visited``, if there is
        a ``visit``.

    Raises:
        InvalidArgumentError: there is no such axis here, or it is of another size.
        ShapeMismatchError: shapes that do not fit each other.
    """
    check_axis(axis_name, axis_size)
    _check_arrays(q, k, v, sinks)
    rank, seq = lax.axis_index(axis_name), q.shape[1] * axis_size
    lens = jnp.full(q.shape[0], seq, jnp.int32) if kv_lens is None else jnp.asarray(kv_lens, jnp.int32)
    positions = zigzag_positions(seq, axis_size, rank)
    if kv_lens is not None:  # a weight of 0 does not hide what padding may hold: 0 * NaN is NaN
        v = jnp.where((positions < lens[:, None])[..., None, None], v, 0)
    window, chunk = (None if x is None else jnp.asarray(x, jnp.int32) for x in (sliding_window, chunk_size))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    pairs = Pairs(lens, Visibility(True, window, chunk), scale, logits_soft_cap, chunk_length(seq, axis_size))
    queries = Queries.create(q, positions, lens, k.shape[2])
    state = queries.start(v.shape[-1], sinks)

    onwards = [(i, (i + 1) % axis_size) for i in range(axis_size)]
    for step in range(axis_size):
        coming = [lax.ppermute(x, axis_name, onwards) for x in (k, v)] if step + 1 < axis_size else [k, v]
        source = (rank - step) % axis_size
        if visit is not None:
            visited = visit(visited, k, v, zigzag_positions(seq, axis_size, source))
        starts = jnp.stack([source, 2 * axis_size - 1 - source]) * pairs.chunk
        for query_half, key_half in chunk_pairs(rank, source) if step else chunk_pairs(0, 0):
            state = pairs.add(state, queries, query_half, k, v, key_half, starts[key_half])
        k, v = coming
    out, lse = queries.finish(state, q.shape)
    real = (positions < lens[:, None])[..., None]
    out, lse = jnp.where(real[..., None], out, 0).astype(q.dtype), jnp.where(real, lse, -jnp.inf)
    return (out, lse) if visit is None else (out, lse, visited)


def _axis_sizes(mesh: Mesh, axis: str, tensor_axis: str | None, batch_axis: str | None) -> dict[str, int]:
    named = [name for name in (axis, tensor_axis, batch_axis) if name is not None]
    if len(set(named)) < len(named) or not set(named) <= set(mesh.axis_names):
        raise InvalidArgumentError(f"axes: got {named}, want different ones of the mesh's {mesh.axis_names}")
    return {name: mesh.shape[name] for name in named}


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ShapeMismatchError(
                f"{name}: got {array.dtype}{list(array.shape)}, want floating [batch, seq, heads, head_dim]"
            )
    if not k.shape[2] or q.shape[2] % k.shape[2] or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]):
        want = f"[{q.shape[0]}, {q.shape[1]}, a divisor of {q.shape[2]}, {q.shape[3]}]"
        raise ShapeMismatchError(f"k: got shape {list(k.shape)}, want {want}, to go with q")
    if v.shape[:3] != k.shape[:3]:
        raise ShapeMismatchError(f"v: got shape {list(v.shape)}, want [{', '.join(map(str, k.shape[:3]))}, v_head_dim]")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ShapeMismatchError(f"sinks: got shape {list(sinks.shape)}, want [{q.shape[2]}], one a query head")


def _checked_number(name: str, value: ArrayLike) -> jax.Array:
    whole = name in ("sliding_window", "chunk_size")
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.ndim or (whole and not jnp.issubdtype(array.dtype, jnp.integer)):
        want = "one integer" if whole else "one number"
        raise InvalidArgumentError(f"{name}: got {array.dtype}{list(array.shape)}, want {want}")
    if is_concrete(array) and ((whole and array < 1) or (name == "logits_soft_cap" and not array > 0)):
        raise InvalidArgumentError(f"{name}: got {array}, want {'at least 1' if whole else 'more than 0'}")
    return jnp.asarray(array, jnp.int32 if whole else jnp.float32)


def _checked_lens(kv_lens: ArrayLike, batch: int, seq: int) -> jax.Array:
    lens = kv_lens if isinstance(kv_lens, jax.Array) else np.asarray(kv_lens, np.int32)
    if lens.shape != (batch,):
        raise ShapeMismatchError(f"kv_lens: got shape {list(lens.shape)}, want [{batch}], one a sequence")
    if is_concrete(lens) and ((np.asarray(lens) < 0) | (np.asarray(lens) > seq)).any():
        raise InvalidArgumentError(f"kv_lens: got {np.asarray(lens).tolist()}, want 0 to {seq} each")
    return jnp.asarray(lens, jnp.int32)
