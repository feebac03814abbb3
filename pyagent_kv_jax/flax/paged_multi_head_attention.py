"""``nnx.MultiHeadAttention`` that decodes through a paged cache of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integers
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import InvalidArgumentError, RequestTooLongError, ShapeMismatchError, is_concrete

Rope = Callable[[jax.Array, jax.Array], jax.Array]


class PagedMultiHeadAttention(nnx.MultiHeadAttention):
    """``nnx.MultiHeadAttention`` whose ``decode=True`` keeps K and V in pages, and takes prompts whole.

    Parameters, constructor and call are those of ``nnx.MultiHeadAttention``, so a checkpoint of one is one of the
    other, and without ``decode`` it is the same module. In decode, a call may bring any number of tokens a row (a
    prompt, a chunk of it, the next token), rows may be of different lengths, and memory grows with what they hold:

    >>> attention = PagedMultiHeadAttention(8, 64, decode=True, deterministic=True, rngs=nnx.Rngs(0))
    >>> attention.init_cache((4, 1024, 64))                   # rows, most tokens of a row, features
    >>> out = attention(prompts, lengths=jnp.array([7, 3, 9, 1]))   # prompts [4, 9, 64], padded
    >>> out = attention(next_tokens)                          # [4, 1, 64]

    The cache is an ``nnx.Cache`` variable of one pytree, ``paged_cache``: it goes through ``nnx.split``, ``nnx.jit``
    and the rest like the variables of ``nnx.MultiHeadAttention``, and is private: each module has a table and a pool.
    For a whole model share one ``PagedKVCache`` among the layers instead.

    Besides the arguments of ``nnx.MultiHeadAttention``:

    Args:
        sliding_window: tokens a query sees in decode, itself included. None: all.
        rope: ``rope(x [batch, n, heads, head_dim], positions i32[batch, n])``, applied to q and k; in decode the cache
            knows the positions, without it they are 0, 1, ....
        cache_options: fields of ``KVCacheConfig``: ``block_size``, ``num_blocks`` (by default as many as all rows can
            fill), ``dtype`` (int8 or fp8 for quantised pages), ``kernel_block_size``, ``device``.

    Raises:
        InvalidArgumentError: options that decode cannot honour, see ``__call__``.
    """

    def __init__(
        self,
        *args: Any,
        sliding_window: int | None = None,
        rope: Rope | None = None,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.sliding_window = sliding_window
        self.rope = rope
        self.has_default_attention = "attention_fn" not in options
        if rope is not None:
            options["attention_fn"] = partial(_roped, rope, options.get("attention_fn", nnx.dot_product_attention))
        super().__init__(*args, **options)
        self.cache_options = dict(cache_options or {})
        self.paged_cache: nnx.Cache | None = nnx.data(None)

    def init_cache(self, input_shape: Sequence[int], dtype: Any = None) -> None:
        """Make an empty cache, or empty the one there is.

        Args:
            input_shape: (rows, most tokens of a row, features), as for ``nnx.MultiHeadAttention``.
            dtype: of the pages, where ``cache_options`` name none. None: float32 on CPUs, bfloat16 elsewhere.

        Raises:
            ShapeMismatchError: not such a shape.
            ConfigError: as ``KVCacheConfig``.
        """
        if len(input_shape) != 3:
            raise ShapeMismatchError(f"input_shape: got {tuple(input_shape)}, want (rows, tokens, features)")
        rows, most_tokens, _ = input_shape
        options: dict[str, Any] = {"block_size": 16, "dtype": None if dtype is None else jnp.dtype(dtype).name}
        options |= self.cache_options
        blocks = rows * math.ceil(most_tokens / options["block_size"])
        config = KVCacheConfig(
            num_layers=1,
            num_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            **{"num_blocks": blocks, **options},
            max_num_reqs=rows,
            max_model_len=most_tokens,
        )
        self.paged_cache = nnx.Cache(PagedKVCache.create(config))

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        lengths: ArrayLike | None = None,
        decode: bool | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attention; in decode over all that the rows hold, this call's tokens last, each seeing those before it.

        Args:
            inputs_q: [batch, n, features].
            inputs_k: [batch, n, features]; None: ``inputs_q``.
            inputs_v: likewise; None: ``inputs_k``.
            lengths: i32[batch], in decode: how many of the n tokens of each row are real, the first ones. None: all.
            decode: overrides the module's.
            **options: of ``nnx.MultiHeadAttention``. In decode ``mask``, ``sow_weights``, dropout that is not
                switched off and an ``attention_fn`` of one's own are refused: pages are read by kernels.

        Returns:
            [batch, n, out_features]. In decode, padding gives what the output projection makes of zeros, and a row for
            which there were no blocks left gives NaN, and keeps what it had.

        Raises:
            ShapeMismatchError: inputs that do not fit the cache.
            InvalidArgumentError: no cache, or an option that decode cannot honour.
            RequestTooLongError: (outside ``jit``; inside, the row gives NaN) a row that outgrows the cache.
        """
        decode = self.decode if decode is None else decode
        if not decode:
            if lengths is not None:
                raise InvalidArgumentError(f"lengths: got {lengths!r} without decode, want a mask there")
            return super().__call__(inputs_q, inputs_k, inputs_v, decode=decode, **options)
        self._check_options(options)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        cache = self._checked_cache(inputs_q, inputs_k, inputs_v)
        batch, n, _ = inputs_q.shape
        counts = jnp.full(batch, n, jnp.int32) if lengths is None else integers("lengths", lengths, batch)
        self._check_lengths(cache, counts, n)
        shardings = {"out_sharding": options.get("qkv_sharding")}
        q, k = self.query(inputs_q, **shardings), self.key(inputs_k, **shardings)
        v = self.value(inputs_v, **shardings)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        if self.rope is not None:
            positions = cache.table.num_tokens[:, None] + jnp.arange(n, dtype=jnp.int32)
            q, k = self.rope(q, positions), self.rope(k, positions)
        cache, meta = cache.extend(jnp.where(counts <= n, counts, -1), num_tokens=None if n == 1 else batch * n)
        places = _places(meta, batch, n)
        q, k, v = (x.reshape(-1, *x.shape[2:]).at[places].get(mode="fill", fill_value=0) for x in (q, k, v))
        attended, cache = cache.attend(0, q, k, v, meta, sliding_window=self.sliding_window)
        assert self.paged_cache is not None
        self.paged_cache.set_value(cache)
        out = jnp.zeros_like(attended).at[places].set(attended, mode="drop").reshape(batch, n, *attended.shape[1:])
        out = jnp.where(meta.ok[:, None, None, None], out, jnp.nan)
        return self.out(out, out_sharding=options.get("out_sharding"))

    def _check_options(self, options: dict[str, Any]) -> None:
        """That nothing is asked of decode that a kernel over pages cannot do."""
        deterministic = options.get("deterministic")
        deterministic = self.deterministic if deterministic is None else deterministic
        refused = {
            "mask": options.get("mask") is not None,
            "sow_weights": bool(options.get("sow_weights")),
            "attention_fn": not self.has_default_attention,
            "dropout": self.dropout_rate > 0 and not deterministic,
        }
        if any(refused.values()):
            wrong = [name for name, given in refused.items() if given]
            raise InvalidArgumentError(f"{type(self).__name__}: got {', '.join(wrong)} in decode, want it without")

    def _checked_cache(self, *inputs: jax.Array) -> PagedKVCache:
        """The cache, if there is one and the inputs fit it and each other."""
        name = type(self).__name__
        if self.paged_cache is None:
            raise InvalidArgumentError(
                f"{name}: got decode=True without a cache, want init_cache((rows, most tokens, features)) called before"
            )
        cache: PagedKVCache = self.paged_cache.get_value()
        rows, shape = cache.config.max_num_reqs, inputs[0].shape
        if len(shape) != 3 or shape[0] != rows or any(x.shape[:2] != shape[:2] for x in inputs):
            raise ShapeMismatchError(
                f"{name}: got inputs of shapes {[list(x.shape) for x in inputs]}, want [{rows}, n, features] each, for "
                f"its cache of {rows} rows of {cache.config.max_model_len} tokens; init_cache() makes another"
            )
        return cache

    def _check_lengths(self, cache: PagedKVCache, counts: jax.Array, n: int) -> None:
        if not is_concrete(counts, cache.table.num_tokens):
            return
        given, held = np.asarray(counts), np.asarray(cache.table.num_tokens)
        if ((given < 0) | (given > n)).any():
            raise InvalidArgumentError(f"lengths: got {given.tolist()}, want 0 to {n} each, the tokens of a row")
        most = cache.config.max_model_len
        if (held + given > most).any():
            row = int(np.argmax(held + given))
            raise RequestTooLongError(
                f"{type(self).__name__}: row {row} would hold {held[row] + given[row]} tokens, want at most {most}, as "
                f"init_cache() was told"
            )


def _places(meta: AttentionMetadata, batch: int, n: int) -> jax.Array:
    """i32[batch * n]: where in [batch, n] each token stands when rows follow each other; past the end for padding."""
    if meta.query_start_loc is None:
        return jnp.arange(batch, dtype=jnp.int32)
    starts, tokens = meta.query_start_loc, jnp.arange(batch * n, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(starts, tokens, side="right") - 1, 0, batch - 1)
    return jnp.where(tokens < starts[-1], row * n + tokens - starts[row], batch * n)


def _roped(rope: Rope, attention_fn: Callable[..., jax.Array], query: Any, key: Any, *args: Any, **options: Any) -> Any:
    positions = (jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]) for x in (query, key))
    return attention_fn(*(rope(x, at) for x, at in zip((query, key), positions, strict=True)), *args, **options)
