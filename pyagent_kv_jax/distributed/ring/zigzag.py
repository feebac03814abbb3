"""The zig-zag order of a sequence over ranks, in which causal attention is the same work for each of them.

A sequence is cut into 2C equal chunks for C ranks, and rank r has chunks r and 2C - 1 - r: one early, which sees
little, and one late, which sees much. (The striped order of arXiv 2311.09431 serves the same end.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import static_count
from pyagent_kv_jax.errors import ShapeMismatchError


def zigzag_positions(seq_len: int, size: int, rank: ArrayLike | None = None) -> jax.Array:
    """Which position of the sequence stands where in zig-zag order.

    Args:
        seq_len: static, a multiple of ``2 * size``; padding included.
        size: static, C ranks.
        rank: i32[], may be traced; None: all ranks, one after another.

    Returns:
        i32[seq_len], or of one rank i32[seq_len / C].

    Raises:
        ShapeMismatchError: a length that does not divide.
    """
    chunk = chunk_length(seq_len, size)
    ranks = jnp.arange(size, dtype=jnp.int32) if rank is None else jnp.asarray(rank, jnp.int32)[None]
    chunks = jnp.stack([ranks, 2 * size - 1 - ranks], axis=1)
    return (chunks[..., None] * chunk + jnp.arange(chunk, dtype=jnp.int32)).reshape(-1)


def zigzag_shard(x: jax.Array, size: int, dim: int = 1) -> jax.Array:
    """``x`` with dimension ``dim``, a sequence, put into zig-zag order: sharded over C ranks, each has its own.

    Best done where a sequence is small, on token ids: moved later, everything goes from device to device.

    Raises:
        ShapeMismatchError: a length that does not divide.
    """
    return _in_order_of(x, size, dim, _chunk_order(size))


def zigzag_unshard(x: jax.Array, size: int, dim: int = 1) -> jax.Array:
    """The same backwards: from zig-zag order to the order of the sequence.

    Raises:
        ShapeMismatchError: a length that does not divide.
    """
    return _in_order_of(x, size, dim, np.argsort(_chunk_order(size)))


def chunk_length(seq_len: int, size: int) -> int:
    """Tokens of one of the 2C chunks.

    Raises:
        ShapeMismatchError: a length that does not divide, or is 0.
    """
    ranks = static_count("size", size, 1)
    if seq_len < 1 or seq_len % (2 * ranks):
        padded = max(-(-seq_len // (2 * ranks)), 1) * 2 * ranks
        raise ShapeMismatchError(
            f"seq: got length {seq_len}, want a multiple of {2 * ranks}, two chunks for each of {ranks} ranks: "
            f"pad it to {padded}, and say with kv_lens how much is real"
        )
    return seq_len // (2 * ranks)


def chunk_pairs(rank: Any, source: Any) -> list[tuple[Any, Any]]:
    """Which of its own two chunks a rank attends with, over which of the two that come from rank ``source``.

    (query half, key half), 0 the early chunk and 1 the late one; ranks may be traced. A rank's own: three pairs, in two
    of which query and key chunk are the same one. Any other's: always two. The late chunk sees every early one. Of two
    early chunks the earlier rank's comes first, of two late ones the later rank's.
    """
    if isinstance(source, int) and isinstance(rank, int) and source == rank:
        return [(0, 0), (1, 0), (1, 1)]
    half = int(source > rank) if isinstance(rank, int) else (source > rank).astype(jnp.int32)
    return [(1, 0), (half, half)]


def _chunk_order(size: int) -> np.ndarray:
    early = np.arange(size)
    return np.stack([early, 2 * size - 1 - early], axis=1).ravel()


def _in_order_of(x: jax.Array, size: int, dim: int, order: np.ndarray) -> jax.Array:
    chunk = chunk_length(x.shape[dim], size)
    dim %= x.ndim
    chunks = x.reshape(*x.shape[:dim], 2 * size, chunk, *x.shape[dim + 1 :])
    return jnp.take(chunks, jnp.asarray(order), axis=dim).reshape(x.shape)
