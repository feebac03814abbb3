"""A cache and what one step knows of it, in one pytree: what the shared forms for NNX and for Linen both hold."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integer, integers, shown, static_count
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.errors import (
    InvalidArgumentError,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    is_concrete,
)


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "meta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CacheInStep:
    """A cache between two steps (no ``meta``) or in one.

    Attributes:
        cache: a ``PagedKVCache``; or only its pages, with a ``config`` (``KVPages``, ``ShardedKVPages``), where another
            keeps the tables.
        meta: of this step.
    """

    cache: Any
    meta: AttentionMetadata | None = None

    def extend(self, caller: str, lens: ArrayLike, num_tokens: int | None, order: jax.Array | None) -> Self:
        """In the next step: see ``PagedKVCache.extend``. ``caller`` is who is named in messages.

        Raises:
            InvalidArgumentError: pages without tables, counts that are none for each row, or an order that is none.
            ShapeMismatchError: counts that are no integers.
            InvalidArgumentError, RequestTooLongError, OutOfBlocksError: (outside ``jit``) a row is refused.
        """
        if not isinstance(self.cache, PagedKVCache):
            raise InvalidArgumentError(
                f"{caller}.extend: got a cache that is {type(self.cache).__name__}, want a PagedKVCache: who keeps the "
                f"tables of these pages makes the metadata too"
            )
        rows = self.cache.config.max_num_reqs
        if np.shape(lens) != (rows,):
            raise InvalidArgumentError(
                f"{caller}.extend: got lens of shape {list(np.shape(lens))}, want [{rows}], a count for each row, 0 "
                f"where it takes no part, for {self._shape()}"
            )
        lens = integers(f"{caller}.extend: lens", lens, rows)
        if num_tokens is not None:
            num_tokens = static_count(f"{caller}.extend: num_tokens", num_tokens)
        if order is not None:
            order = jnp.asarray(integers(f"{caller}.extend: order", order, rows))
            if is_concrete(order) and not np.array_equal(np.sort(order), np.arange(rows)):
                raise InvalidArgumentError(f"{caller}.extend: order: got {order}, want each of 0 to {rows - 1} once")
        cache, meta = self.cache.extend(lens, num_tokens=num_tokens, order=order)
        if is_concrete(meta.ok, lens):
            ok = np.asarray(meta.ok) & (np.asarray(cache.table.num_tokens) <= self.cache.config.max_model_len)
            if not ok.all():
                raise self._refusal(caller, np.asarray(lens), num_tokens, int(np.argmin(ok)))
        return dataclasses.replace(self, cache=cache, meta=meta)

    def attend(
        self, caller: str, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any
    ) -> tuple[jax.Array, Self]:
        """Store and attend: see ``KVPages.attend``; q, k and v have any leading axes whose product is the tokens.

        Raises:
            InvalidArgumentError: not in a step, no such layer, or no such cache.
            ShapeMismatchError: shapes that do not fit the cache or the step.
        """
        meta = self.check(caller, layer, q, k, v)
        tokens = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        out, cache = self.cache.attend(layer, *tokens, meta, **options)
        return out.reshape(*q.shape[:-1], out.shape[-1]), dataclasses.replace(self, cache=cache)

    def check(self, caller: str, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array) -> AttentionMetadata:
        """The metadata of the step, if ``attend`` can be called with these. Raises as ``attend``."""
        if not hasattr(self.cache, "attend"):
            kind = type(self.cache).__name__
            raise InvalidArgumentError(f"{caller}: got a cache that is {kind}, want a PagedKVCache or its pages")
        if self.meta is None:
            raise InvalidArgumentError(
                f"{caller}: got attend() outside a step, want extend(lens) before the layers, for {self._shape()}"
            )
        index, layers = integer("layer", layer), self.cache.config.num_layers
        if is_concrete(index) and not 0 <= index < layers:
            raise InvalidArgumentError(f"{caller}: got layer {index}, want 0 to {layers - 1}, for {self._shape()}")
        config, num_tokens = self.cache.config, self.meta.positions.shape[0]
        heads, dim, v_dim = config.num_heads, config.head_dim, config.value_head_dim
        fits = q.ndim >= 3 and math.prod(q.shape[:-2]) == num_tokens and k.shape[:-2] == v.shape[:-2] == q.shape[:-2]
        fits = fits and q.shape[-2] % heads == 0 and q.shape[-1] == dim
        if not (fits and k.shape[-2:] == (heads, dim) and v.shape[-2:] == (heads, v_dim)):
            raise ShapeMismatchError(
                f"{caller}, layer {shown(index)}: got q, k, v of shapes {[list(x.shape) for x in (q, k, v)]}, want "
                f"[..., a multiple of {heads}, {dim}], [..., {heads}, {dim}], [..., {heads}, {v_dim}] where ... are "
                f"the same axes and {num_tokens} tokens in all, as extend() was told, for {self._shape()}"
            )
        return self.meta

    def _refusal(self, caller: str, lens: np.ndarray, num_tokens: int | None, row: int) -> Exception:
        assert isinstance(self.cache, PagedKVCache)
        held, most = int(self.cache.table.num_tokens[row]), self.cache.config.max_model_len
        got = f"{caller}.extend: row {row}: got {lens[row]} tokens after {held}, want"
        if held + lens[row] > most:
            return RequestTooLongError(f"{got} at most {most} in all, for {self._shape()}")
        if lens[row] < 0 or (num_tokens is None and lens[row] > 1):
            return InvalidArgumentError(f"{got} 0 or 1 without num_tokens, and never less than 0, for {self._shape()}")
        if num_tokens is not None and np.maximum(lens[: row + 1], 0).sum() > num_tokens:
            return InvalidArgumentError(f"{got} at most num_tokens = {num_tokens} of all rows, for {self._shape()}")
        free = int(self.cache.get_num_free_blocks())
        return OutOfBlocksError(f"{got} what fits into {free} free blocks, or rows freed first, for {self._shape()}")

    def _shape(self) -> str:
        config = self.cache.config
        return (
            f"a cache of {config.num_layers} layers, {config.max_num_reqs} rows of {config.max_model_len} tokens, "
            f"{config.num_heads} heads of {config.head_dim}"
        )
