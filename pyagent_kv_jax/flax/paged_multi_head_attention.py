"""``nnx.MultiHeadAttention`` that decodes through a paged cache of its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError
from pyagent_kv_jax.flax.private_cache import (
    CacheOwner,
    Rope,
    attend_padded,
    check_cache,
    checked_counts,
    create_private_cache,
    static_options,
    turned,
)
from pyagent_kv_jax.flax.shared_kv_cache import LayerHandle

_CALL_OPTIONS = frozenset(inspect.signature(nnx.MultiHeadAttention.__call__).parameters)


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
    and the rest like the variables of ``nnx.MultiHeadAttention``, and is private: each module has a table and a pool,
    and ``nnx.scan`` over layers copies all their pages each step. In a model of several layers give each call a handle
    of one ``SharedKVCache`` instead, ``cache=shared.layer(i)``, with tokens laid out as its step's, one row after
    another:

    >>> meta = shared.extend(lens, num_tokens=16)                   # once a step
    >>> x = x + attention(x, cache=shared.layer(3))                 # each layer; x [1, 16, 64]

    Besides the arguments of ``nnx.MultiHeadAttention``:

    Args:
        sliding_window: tokens a query sees in decode, itself included. None: all.
        rope: ``rope(x [batch, n, heads, head_dim], positions i32[batch, n])``, applied to q and k; in decode the cache
            knows the positions, without it they are 0, 1, ....
        cache_options: ``block_size``, ``num_blocks`` (by default as many as all rows can fill) or
            ``memory_fraction``, ``dtype`` (int8 or fp8 for quantised pages, with ``k_scale`` and ``v_scale``: a stored
            element times its scale is K or V), ``kernel_block_size``, ``device``; see ``KVCacheConfig``.
        cache_sharding: where on a mesh the pages lie, KV heads over one axis and tokens over another; a mesh with axes
            "tp" and "dcp" will do. None: on one device. Kernels lie where ``nnx.with_partitioning`` puts them. Call
            such a module under ``nnx.jit``.

    Raises:
        InvalidArgumentError: options that decode cannot honour, see ``__call__``.
        ConfigError: a mesh with axes of other names.
    """

    def __init__(
        self,
        *args: Any,
        sliding_window: int | None = None,
        rope: Rope | None = None,
        cache_options: Mapping[str, Any] | None = None,
        cache_sharding: CacheSharding | Mesh | None = None,
        **options: Any,
    ) -> None:
        self.sliding_window = sliding_window
        self.rope = rope
        super().__init__(*args, **options)
        self.cache_options = static_options(cache_options)
        self.cache_sharding = None if cache_sharding is None else CacheSharding.of(cache_sharding)
        self.paged_cache: nnx.Cache | None = nnx.data(None)

    @property
    def attention_fn(self) -> Callable[..., jax.Array]:
        """What attends without decode. With ``rope`` it turns q and k first."""
        return self._attention_fn if self.rope is None else partial(_roped, self.rope, self._attention_fn)

    @attention_fn.setter
    def attention_fn(self, attention_fn: Callable[..., jax.Array]) -> None:
        self._attention_fn = attention_fn

    def init_cache(self, input_shape: Sequence[int], dtype: Any = None) -> None:
        """Make an empty cache, or empty the one there is.

        Args:
            input_shape: (rows, most tokens of a row, features), as for ``nnx.MultiHeadAttention``; several leading
                axes are rows in all.
            dtype: of the pages, where ``cache_options`` name none. None: what the module computes in, its ``dtype`` or
                that of its parameters.

        Raises:
            ShapeMismatchError: not such a shape.
            ConfigError: as ``KVCacheConfig`` and ``CacheSharding``.
        """
        if len(input_shape) < 3 or input_shape[-1] not in (self.in_features, self.in_kv_features):
            want = f"(rows, tokens, {self.in_features})"
            raise ShapeMismatchError(f"{type(self).__name__}: input_shape: got {tuple(input_shape)}, want {want}")
        *rows, most_tokens, _ = input_shape
        dtype = self.dtype or self.param_dtype if dtype is None else dtype
        self.paged_cache = nnx.Cache(
            create_private_cache(
                self._owner, math.prod(rows), most_tokens, dtype, self.cache_options, self.cache_sharding
            )
        )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        lengths: ArrayLike | None = None,
        cache: LayerHandle | None = None,
        decode: bool | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attention; in decode over all that the rows hold, this call's tokens last, each seeing those before it.

        Args:
            inputs_q: [batch, n, features]; several leading axes are rows in all.
            inputs_k: [batch, n, features]; None: ``inputs_q``.
            inputs_v: likewise; None: ``inputs_k``.
            lengths: i32[batch], in decode: how many of the n tokens of each row are real, the first ones. None: all.
            cache: of this layer, shared with others, in place of the module's own. ``inputs_q`` is then [..., features]
                of as many tokens as its step has, and the step's ``ok`` tells which rows were refused.
            decode: overrides the module's; True where ``cache`` is given.
            **options: of ``nnx.MultiHeadAttention``. In decode ``mask``, ``sow_weights``, ``input_positions``, dropout
                that is not switched off and an ``attention_fn`` of one's own are refused: pages are read by kernels.

        Returns:
            [batch, n, out_features]. In decode, padding gives what the output projection makes of zeros, and a row for
            which there were no blocks left gives NaN (under ``jit``), and keeps what it had.

        Raises:
            ShapeMismatchError: inputs that do not fit the cache, or a cache that does not fit the module.
            InvalidArgumentError: no cache, a shared one that is in no step, or an option that decode cannot honour.
            RequestTooLongError, OutOfBlocksError: (outside ``jit``; inside, the row gives NaN) a row that outgrows the
                cache, or for which there are no blocks left.
        """
        if cache is not None:
            if decode is False or lengths is not None:
                raise InvalidArgumentError(
                    f"{type(self).__name__}: got decode={decode} and lengths={lengths!r} with a shared cache, want "
                    f"neither: its extend() was told the lengths"
                )
            return self._attend_shared(cache, inputs_q, inputs_k, inputs_v, options)
        decode = self.decode if decode is None else decode
        if not decode:
            if lengths is not None:
                raise InvalidArgumentError(f"lengths: got {lengths!r} without decode, want a mask there")
            return super().__call__(inputs_q, inputs_k, inputs_v, decode=decode, **options)
        self._check_options(options)
        inputs_q, inputs_k, inputs_v = self._checked_inputs(inputs_q, inputs_k, inputs_v)
        own = self._checked_cache()
        counts = checked_counts(self._owner, own, (inputs_q, inputs_k, inputs_v), lengths)
        q, k, v = self._projected(inputs_q, inputs_k, inputs_v, options.get("qkv_sharding"))
        out, own = attend_padded(self._owner, own, q, k, v, counts, rope=self.rope, sliding_window=self.sliding_window)
        assert self.paged_cache is not None
        self.paged_cache.set_value(own)
        return self.out(out, out_sharding=options.get("out_sharding"))

    def _attend_shared(
        self,
        cache: LayerHandle,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None,
        inputs_v: jax.Array | None,
        options: dict[str, Any],
    ) -> jax.Array:
        if not isinstance(cache, LayerHandle):
            kind = type(cache).__name__
            raise InvalidArgumentError(f"{type(self).__name__}: got a cache of type {kind}, want shared.layer(i)")
        self._check_options(options)
        inputs_q, inputs_k, inputs_v = self._checked_inputs(inputs_q, inputs_k, inputs_v)
        q, k, v = self._projected(inputs_q, inputs_k, inputs_v, options.get("qkv_sharding"))
        name, in_step = type(self).__name__, cache.shared.get_value()
        positions = in_step.check(name, cache.index, q, k, v).positions
        if self.rope is not None:
            q, k = (turned(self.rope, x, positions) for x in (q, k))
        out, in_step = in_step.attend(name, cache.index, q, k, v, sliding_window=self.sliding_window)
        cache.shared.set_value(in_step)
        return self.out(out, out_sharding=options.get("out_sharding"))

    def _projected(self, inputs_q: jax.Array, inputs_k: jax.Array, inputs_v: jax.Array, sharding: Any) -> Any:
        """Q, K and V [..., n, heads, head_dim]."""
        q, k = self.query(inputs_q, out_sharding=sharding), self.key(inputs_k, out_sharding=sharding)
        v = self.value(inputs_v, out_sharding=sharding)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        return q, k, v

    @property
    def _owner(self) -> CacheOwner:
        remedy = "init_cache((rows, most tokens, features)) makes another"
        return CacheOwner(type(self).__name__, remedy, self.num_kv_heads, self.head_dim)

    def _check_options(self, options: dict[str, Any]) -> None:
        """That nothing is asked of decode that a kernel over pages cannot do."""
        unknown = sorted(set(options) - _CALL_OPTIONS)
        if unknown:
            raise TypeError(f"{type(self).__name__}: got {', '.join(unknown)}, want options of nnx.MultiHeadAttention")
        deterministic = options.get("deterministic")
        deterministic = self.deterministic if deterministic is None else deterministic
        refused = {
            "mask": options.get("mask") is not None,
            "sow_weights": bool(options.get("sow_weights")),
            "input_positions": options.get("input_positions") is not None,
            "attention_fn": self._attention_fn is not nnx.dot_product_attention,
            "dropout": self.dropout_rate > 0 and not deterministic,
        }
        if any(refused.values()):
            wrong = [name for name, given in refused.items() if given]
            raise InvalidArgumentError(f"{type(self).__name__}: got {', '.join(wrong)} in decode, want it without")

    def _checked_inputs(self, q: jax.Array, k: jax.Array | None, v: jax.Array | None) -> tuple[jax.Array, ...]:
        """Inputs of Q, K and V, those that were left out filled in as in ``nnx.MultiHeadAttention``."""
        if k is None and v is not None:
            raise InvalidArgumentError(f"{type(self).__name__}: got inputs_v without inputs_k, want inputs_k for both")
        k = q if k is None else k
        v = k if v is None else v
        wanted = (self.in_features, self.in_kv_features, self.in_kv_features)
        if any(x.shape[-1:] != (features,) for x, features in zip((q, k, v), wanted, strict=True)):
            shapes = [list(x.shape) for x in (q, k, v)]
            raise ShapeMismatchError(
                f"{type(self).__name__}: got inputs of shapes {shapes}, want last axes of {wanted} features"
            )
        return q, k, v

    def _checked_cache(self) -> PagedKVCache:
        if self.paged_cache is None:
            raise InvalidArgumentError(
                f"{type(self).__name__}: got decode=True without a cache, want init_cache((rows, most tokens, "
                f"features)) called before"
            )
        return check_cache(self._owner, self.paged_cache.get_value())


def _roped(rope: Rope, attention_fn: Callable[..., jax.Array], q: Any, k: Any, *args: Any, **options: Any) -> jax.Array:
    """``attention_fn`` of turned Q and K."""
    return attention_fn(turned(rope, q), turned(rope, k), *args, **options)
