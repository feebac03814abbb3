"""The obvious alternative: one contiguous row of ``max_len`` tokens a request, reserved whole when it comes.

It is what a Flax user has today, written as well as that form allows, and shares no code with the paged cache: no
page, no kernel of ``pallas_kernels``, and a host-side manager of its own. Seen from outside, a row is one block of
``max_len`` tokens, so the same scheduler and the same model run over it: an honest baseline and an independent check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLongError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.step_plan import AdmissionPreview, StepPlan


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseKVCache:
    """K and V in contiguous rows.

    Attributes:
        k: [layers, rows, kv_heads, max_len, head_dim]; carried through the layer scan and written in place.
        v: the same with the V head_dim.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def create(cls, config: KVCacheConfig) -> Self:
        """Zeros for ``config.num_blocks`` rows of ``config.block_size`` tokens."""
        shape = (config.num_layers, config.pool_blocks, config.num_heads, config.block_size)
        dtype = config.kv_dtype.jax_dtype
        return cls(jnp.zeros((*shape, config.head_dim), dtype), jnp.zeros((*shape, config.value_head_dim), dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.k.nbytes + self.v.nbytes

    def attend(
        self,
        layer: ArrayLike,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        meta: AttentionMetadata,
        *,
        scale: float | None = None,
        sliding_window: ArrayLike | None = None,
        chunk_size: ArrayLike | None = None,
        logits_soft_cap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, Self]:
        """As ``LayerCache.attend``; ``meta.block_tables`` i32[R, 1] names each request's row."""
        cache = self._write(layer, k, v, meta.slot_mapping)
        attend = partial(
            _attend_row,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            window=sliding_window,
            chunk_size=chunk_size,
            soft_cap=logits_soft_cap,
            sinks=sinks,
        )
        ragged = meta.query_start_loc is not None
        out = (cache._attend_ragged if ragged else cache._attend_decode)(layer, q, meta, attend)
        return out.astype(q.dtype), cache

    def _write(self, layer: ArrayLike, k: jax.Array, v: jax.Array, slots: jax.Array) -> Self:
        rows, max_len = self.k.shape[1], self.k.shape[3]
        row = jnp.where(slots < 0, rows, slots // max_len)  # -1 goes past the end, where "drop" drops it
        at = (layer, row, slice(None), slots % max_len)
        return dataclasses.replace(
            self,
            k=self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )

    def _attend_decode(self, layer: ArrayLike, q: jax.Array, meta: AttentionMetadata, attend: Any) -> jax.Array:
        """One query a request: put the queries in the order of the rows and attend over all rows at once."""
        rows = self.k.shape[1]
        row = jnp.where(meta.kv_lens > 0, meta.block_tables[:, 0], rows)
        q_rows = jnp.zeros((rows, 1, *q.shape[1:]), q.dtype).at[row, 0].set(q, mode="drop")
        lens = jnp.zeros(rows, jnp.int32).at[row].set(meta.kv_lens, mode="drop")
        out = jax.vmap(attend)(q_rows, self.k[layer], self.v[layer], lens, lens - 1)
        return out[:, 0].at[row].get(mode="fill", fill_value=0)

    def _attend_ragged(self, layer: ArrayLike, q: jax.Array, meta: AttentionMetadata, attend: Any) -> jax.Array:
        """Queries padded to ``[R, max_query_len]``, one row at a time, so that decoding rows skip the padding.

        A chunk of a prompt attends over the first 1/8, 1/4, 1/2 or all of its row, whichever holds what is written.
        """
        assert meta.query_start_loc is not None
        starts, num_queries = meta.query_start_loc[:-1], jnp.diff(meta.query_start_loc)
        max_query_len = q.shape[0] if meta.max_query_len is None else min(meta.max_query_len, q.shape[0])
        padded = (max_query_len, q.shape[1], self.v.shape[-1])
        prefixes = [-(-self.k.shape[3] // part) for part in (8, 4, 2, 1)]

        def run_row(inputs: Any) -> jax.Array:
            row, start, count, kv_len = inputs

            def attend_over(width: int, prefix: int) -> jax.Array:
                queries = q.at[start + jnp.arange(width)].get(mode="fill", fill_value=0)
                k, v = self.k[layer, row, :, :prefix], self.v[layer, row, :, :prefix]
                out = attend(queries, k, v, kv_len, kv_len - count)
                return jnp.zeros(padded, out.dtype).at[:width].set(out)

            branches = [partial(jnp.zeros, padded, jnp.float32), partial(attend_over, 1, prefixes[-1])]
            branches += [partial(attend_over, max_query_len, prefix) for prefix in prefixes]
            chunk = 2 + jnp.sum(kv_len > jnp.array(prefixes[:-1]))
            return jax.lax.switch(jnp.where(count > 1, chunk, count), branches)

        out = jax.lax.map(run_row, (meta.block_tables[:, 0], starts, num_queries, meta.kv_lens))
        token = jnp.arange(q.shape[0])
        request = jnp.searchsorted(meta.query_start_loc, token, side="right") - 1
        # Padding tokens lie past the last request: "fill" answers them with zeros.
        return out.at[request, token - starts.at[request].get(mode="clip")].get(mode="fill", fill_value=0)


def _attend_row(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_len: jax.Array,
    first_position: jax.Array,
    *,
    scale: float,
    window: ArrayLike | None,
    chunk_size: ArrayLike | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Plain causal attention of q [n, q_heads, d] over one row k [kv_heads, max_len, d]; f32[n, q_heads, v_dim]."""
    n, (kv_heads, max_len, _) = q.shape[0], k.shape
    grouped = q.reshape(n, kv_heads, -1, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("nhgd,hld->nhgl", grouped, k.astype(jnp.float32)) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    position, at = first_position + jnp.arange(n)[:, None], jnp.arange(max_len)
    seen = (at <= position) & (at < kv_len)
    if window is not None:
        seen &= at > position - window
    if chunk_size is not None:
        seen &= at // chunk_size == position // chunk_size
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.reshape(1, kv_heads, -1, 1))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.reshape(1, kv_heads, -1, 1) - peak)
    out = jnp.einsum("nhgl,hld->nhgd", weights, v.astype(jnp.float32)) / jnp.where(total == 0, 1.0, total)
    return out.reshape(n, q.shape[1], v.shape[-1])


class DenseCacheManager:
    """Hands out whole rows; the interface of ``KVCacheManager`` as far as serving needs it (``CacheBackend``).

    Rows share nothing and go nowhere: no prefix is found, no request forked or swapped.

    Args:
        config: ``num_blocks`` rows of ``block_size`` tokens each; ``block_size`` must be ``max_model_len``.

    Raises:
        InvalidArgumentError: it is not.
    """

    can_fork = False
    sharding: CacheSharding | None = None

    def __init__(self, config: KVCacheConfig) -> None:
        if config.block_size != config.max_model_len:
            raise InvalidArgumentError(
                f"config.block_size: got {config.block_size}, want max_model_len = {config.max_model_len} (a whole row)"
            )
        self.config = config
        self.pages = DenseKVCache.create(config)
        self._waiting: set[str] = set()  # added or preempted
        self._rows: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        self._unused = list(range(config.pool_blocks))[::-1]

    @classmethod
    def like(cls, config: KVCacheConfig, num_rows: int) -> Self:
        """A dense cache of ``num_rows`` rows for the model and longest request of ``config``."""
        return cls(dataclasses.replace(config, block_size=config.max_model_len, num_blocks=num_rows))

    def get_num_free_blocks(self) -> int:
        """Rows nobody holds."""
        return len(self._unused)

    def add_request(self, request_id: str, tokens: Any) -> None:
        """Expect a request; its tokens are of no use here.

        Raises:
            DuplicateRequestError: it is here.
        """
        if request_id in self._rows or request_id in self._waiting:
            raise DuplicateRequestError(f"request {request_id!r}: is already here, want a new id")
        self._waiting.add(request_id)

    def record_tokens(self, request_ids: Sequence[str], tokens: Any) -> None:
        """Nothing: tokens are of no use here."""

    def preview(self, request_id: str) -> AdmissionPreview:
        """One row, and every token to be computed.

        Raises:
            UnknownRequestError: it was not added, or holds a row.
        """
        if request_id not in self._waiting:
            raise UnknownRequestError(f"request {request_id!r}: want one of {sorted(self._waiting)}, which hold no row")
        return AdmissionPreview(num_cached_tokens=0, num_blocks=1)

    def fork(self, parent: str, child: str) -> None:
        """Raise ``InvalidArgumentError``: two requests cannot share a row."""
        raise InvalidArgumentError(f"fork: got {parent!r} and {child!r} in a dense cache, want requests of their own")

    def preempt(
        self, request_ids: Sequence[str], mode: Literal["auto", "swap", "recompute"] = "auto"
    ) -> dict[str, str]:
        """Take rows away; the requests have to be computed again.

        Raises:
            UnknownRequestError: an id that holds no row.
            InvalidArgumentError: mode "swap", for which there is nothing here.
        """
        if mode == "swap":
            raise InvalidArgumentError("mode: got 'swap' for a dense cache, want 'auto' or 'recompute'")
        for request_id in request_ids:
            if request_id not in self._rows:
                raise UnknownRequestError(f"request {request_id!r}: unknown, want one of {list(self._rows)}")
        for request_id in request_ids:
            self.free(request_id)
        self._waiting.update(request_ids)
        return dict.fromkeys(request_ids, "recompute")

    def free(self, request_id: str) -> None:
        """Give the request's row back, if it has one, and forget it.

        Raises:
            UnknownRequestError: it is not here.
        """
        if request_id in self._waiting:
            self._waiting.remove(request_id)
            return
        if request_id not in self._rows:
            raise UnknownRequestError(f"request {request_id!r}: unknown, want one of {list(self._rows)}")
        self._unused.append(self._rows.pop(request_id))
        del self._lengths[request_id]

    def reset_prefix_cache(self) -> None:
        """Nothing: there is none."""

    def warm_up(self, num_rows: int, num_tokens: int | None = None) -> None:
        """Nothing: no step of this manager is compiled."""

    def step(
        self,
        request_ids: Sequence[str],
        num_new_tokens: Any,
        *,
        free: Iterable[str] = (),
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> StepPlan:
        """As ``KVCacheManager.step``: free, then give each new request a row while there are any.

        Raises:
            UnknownRequestError: an id in ``free`` holds nothing.
            RequestTooLongError: a request that would outgrow its row.
        """
        ids, freed = tuple(request_ids), tuple(free)
        known = self._rows.keys() | self._waiting
        if unknown := [request_id for request_id in freed if request_id not in known]:
            raise UnknownRequestError(f"free: got {unknown}, want ids among {list(self._rows)}")
        counts = np.asarray(num_new_tokens, np.int32).reshape(len(ids))
        lengths = np.array([self._lengths.get(i, 0) for i in ids], np.int32)
        if (lengths + counts > self.config.max_model_len).any():
            longest = int((lengths + counts).max())
            raise RequestTooLongError(f"request of {longest} tokens, want at most {self.config.max_model_len}")
        for request_id in freed:
            self.free(request_id)
        for request_id in ids:
            if request_id not in self._rows and self._unused:
                self._rows[request_id] = self._unused.pop()
                self._waiting.discard(request_id)
        rows = np.array([self._rows.get(i, -1) for i in ids], np.int32)
        ok = rows >= 0
        self._lengths.update((i, int(n)) for i, n in zip(ids, lengths + counts, strict=True) if i in self._rows)
        counts = np.where(ok, counts, 0).astype(np.int32)
        metadata = self._metadata(rows, lengths, counts, ok, num_rows or len(ids), num_tokens)
        return StepPlan(ids, ok, counts, metadata, np.zeros(len(ids), np.int32))

    def _metadata(
        self,
        rows: Any,
        lengths: Any,
        counts: Any,
        ok: np.ndarray,
        num_rows: int,
        num_tokens: int | None,
    ) -> AttentionMetadata:
        """Numpy metadata padded to ``num_rows`` rows and ``num_tokens`` tokens (None: decode layout)."""
        pad = (0, num_rows - len(rows))
        rows, lengths, counts = np.pad(rows, pad, constant_values=-1), np.pad(lengths, pad), np.pad(counts, pad)
        query_start_loc = None
        token_row, offset, used = np.arange(num_rows), np.zeros(num_rows, np.int32), counts > 0
        if num_tokens is not None:
            query_start_loc = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            used = np.arange(num_tokens) < query_start_loc[-1]
            token_row = np.resize(np.repeat(np.arange(num_rows), counts), num_tokens) if used.any() else used * 0
            offset = np.arange(num_tokens) - query_start_loc[token_row]
        positions = np.where(used, lengths[token_row] + offset, 0).astype(np.int32)
        slots = np.where(used, rows[token_row] * self.config.max_model_len + positions, -1).astype(np.int32)
        arrays: dict[str, Any] = {
            "block_tables": rows[:, None],
            "kv_lens": np.where(counts > 0, lengths + counts, 0).astype(np.int32),
            "query_start_loc": query_start_loc,
            "slot_mapping": slots,
            "positions": positions,
            "ok": np.pad(ok, pad),
        }
        return AttentionMetadata(**arrays)
