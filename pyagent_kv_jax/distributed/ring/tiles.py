"""What a rank of the ring computes: chunks of queries over chunks of keys, tile by tile, with an online softmax.

``jax.nn.dot_product_attention`` would hold all logits of two chunks at once, and knows neither soft caps nor sinks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.online_softmax import OnlineSoftmax
from pallas_kernels.paged_attention.visibility import Visibility

_TILE = 512  # queries, and keys, that meet at a time: their logits take 1 MiB a head


@dataclasses.dataclass(frozen=True)
class Queries:
    """The rank's queries, both halves of them cut into T tiles of t, the last one padded.

    Attributes:
        tiles: [2, T, batch, kv_heads, group * t, d].
        positions: i32[2, T, batch, t]; -1 for padding, which sees nothing.
    """

    tiles: jax.Array
    positions: jax.Array

    @classmethod
    def create(cls, q: jax.Array, positions: jax.Array, lens: jax.Array, kv_heads: int) -> Queries:
        batch, tokens, heads, d = q.shape
        chunk = tokens // 2
        tile = min(chunk, _TILE)
        num, group = -(-chunk // tile), heads // kv_heads
        missing = num * tile - chunk
        halves = jnp.pad(q.reshape(batch, 2, chunk, kv_heads, group, d), ((0, 0), (0, 0), (0, missing), *((0, 0),) * 3))
        tiles = halves.reshape(batch, 2, num, tile, kv_heads, group, d).transpose(1, 2, 0, 4, 5, 3, 6)
        own = jnp.where(positions < lens[:, None], positions, -1).reshape(batch, 2, chunk)
        own = jnp.pad(own, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
        return cls(
            tiles.reshape(2, num, batch, kv_heads, group * tile, d),
            own.reshape(batch, 2, num, tile).transpose(1, 2, 0, 3),
        )

    def start(self, v_head_dim: int, sinks: jax.Array | None) -> OnlineSoftmax:
        """The softmax over no keys but the sinks, by [2, T] tiles."""
        halves, num, batch, kv_heads, rows, _ = self.tiles.shape
        if sinks is not None:
            tile = self.positions.shape[-1]
            sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, -1), tile, axis=1)
            sinks = jnp.tile(sinks, (batch, 1))
        one = OnlineSoftmax.start(batch * kv_heads, rows, v_head_dim, sinks)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (halves, num, *x.shape)), one)

    def finish(self, state: OnlineSoftmax, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Out f32[batch, tokens, heads, dv] and LSE f32[batch, tokens, heads] of queries of ``shape``."""
        batch, tokens, heads, _ = shape
        halves, num, _, kv_heads, _, _ = self.tiles.shape
        out, lse = jax.vmap(jax.vmap(OnlineSoftmax.finish))(state)
        split = halves, num, batch, kv_heads, heads // kv_heads, self.positions.shape[-1]
        out = out.reshape(*split, -1).transpose(2, 0, 1, 5, 3, 4, 6).reshape(batch, 2, -1, heads, out.shape[-1])
        lse = lse.reshape(split).transpose(2, 0, 1, 5, 3, 4).reshape(batch, 2, -1, heads)
        out, lse = (x[:, :, : tokens // 2].reshape(batch, tokens, *x.shape[3:]) for x in (out, lse))
        return out, lse


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One chunk of queries over one chunk of keys.

    Attributes:
        lens: i32[batch].
        visibility: the mask, but for lengths.
        scale: of the logits.
        soft_cap: of the logits, or None.
        chunk: tokens of a chunk.
    """

    lens: jax.Array
    visibility: Visibility
    scale: Any
    soft_cap: Any
    chunk: int

    def add(
        self,
        state: OnlineSoftmax,
        queries: Queries,
        query_half: Any,
        k: jax.Array,
        v: jax.Array,
        key_half: Any,
        key_start: jax.Array,
    ) -> OnlineSoftmax:
        """``state`` after a half of ``queries`` has seen a half of ``k``, which begins at position ``key_start``."""
        first = key_half * self.chunk

        def of_tile(xs: tuple[jax.Array, jax.Array, OnlineSoftmax]) -> OnlineSoftmax:
            return self._over_tiles(*xs, k, v, first, key_start)

        half = jax.tree.map(lambda x: x[query_half], (queries.tiles, queries.positions, state))
        return jax.tree.map(lambda x, new: x.at[query_half].set(new), state, lax.map(of_tile, half))

    def _over_tiles(
        self,
        q: jax.Array,
        positions: jax.Array,
        softmax: OnlineSoftmax,
        k: jax.Array,
        v: jax.Array,
        first: Any,
        key_start: jax.Array,
    ) -> OnlineSoftmax:
        """One tile of queries; of the keys, only the tiles that one of them can see."""
        tile = min(self.chunk, _TILE)
        num = -(-self.chunk // tile)
        start, end = self.visibility.interval(positions, self.lens[:, None])
        lowest = jnp.min(jnp.where(end > start, start, key_start + self.chunk))
        from_tile = jnp.clip((lowest - key_start) // tile, 0, num)
        to_tile = jnp.clip(-(-(jnp.max(end) - key_start) // tile), 0, num)

        def body(index: jax.Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
            fresh = index * tile
            begin = jnp.minimum(fresh, self.chunk - tile)  # the last tile reaches back over keys that were counted
            within = begin + jnp.arange(tile, dtype=jnp.int32)
            at = jnp.where(within >= fresh, key_start + within, -1)
            visible = (at >= start[..., None]) & (at < end[..., None])
            keys, values = (lax.dynamic_slice_in_dim(x, first + begin, tile, axis=1) for x in (k, v))
            return softmax.add(*self._logits_and_values(q, keys, values, visible))

        return lax.fori_loop(from_tile, to_tile, body, softmax)

    def _logits_and_values(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """f32[batch * kv_heads, group * t, n] and f32[batch * kv_heads, n, dv], of n keys ``k`` [batch, n, ...]."""
        batch, kv_heads, rows, _ = q.shape
        logits = jnp.einsum(
            "bgmd,bngd->bgmn", q, k, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        logits *= self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        by_query = logits.reshape(batch, kv_heads, -1, *visible.shape[1:])
        logits = jnp.where(visible[:, None, None], by_query, -jnp.inf).reshape(batch * kv_heads, rows, -1)
        return logits, v.astype(jnp.float32).swapaxes(1, 2).reshape(batch * kv_heads, -1, v.shape[-1])
