"""Linen's ``MultiHeadDotProductAttention`` that decodes through a paged cache of its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError
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


class PagedMultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """``nn.MultiHeadDotProductAttention`` whose ``decode=True`` keeps K and V in pages, and takes prompts whole.

    Parameters, fields and call are those of ``nn.MultiHeadDotProductAttention``, so a checkpoint of one is one of the
    other, and without ``decode`` it is the same module. The cache is made as Linen's is, by ``init`` on inputs of the
    longest rows, and is kept in the ``cache`` collection, a pytree named ``paged_cache``. In decode, a call may bring
    any number of tokens a row (a prompt, a chunk of it, the next token), and rows may be of different lengths:

    >>> attention = PagedMultiHeadDotProductAttention(8, decode=True)
    >>> variables = attention.init(key, jnp.ones((4, 1024, 64)))    # rows, most tokens of a row, features
    >>> params, cache = variables["params"], variables["cache"]
    >>> out, new = attention.apply({"params": params, "cache": cache}, prompts, lengths=lengths, mutable=["cache"])
    >>> out, new = attention.apply({"params": params, **new}, next_tokens, mutable=["cache"])    # [4, 1, 64]

    Only ``init`` makes a cache; ``apply`` without one is an error. The collection goes through ``flax.serialization``
    and orbax like any other; mapped to zeros it is no cache, so keep the one that ``init`` made to begin again.

    The cache is private: each module has a table and a pool, and ``nn.scan`` over layers copies all their pages each
    step. For a whole model share one ``PagedKVCache`` instead, see ``attend``. A model whose layers Linen names takes
    ``MultiHeadDotProductAttention`` of this package, which is named like Linen's.

    Besides the fields of ``nn.MultiHeadDotProductAttention``:

    Attributes:
        num_kv_heads: heads of K and V, a divisor of ``num_heads`` (grouped-query attention). None: ``num_heads``.
        sliding_window: tokens a query sees in decode, itself included. None: all.
        rope: ``rope(x [batch, n, heads, head_dim], positions i32[batch, n])``, applied to q and k; in decode the cache
            knows the positions, without it they are 0, 1, ....
        cache_options: ``block_size``, ``num_blocks`` (by default as many as all rows can fill) or
            ``memory_fraction``, ``dtype`` (by default that of K; int8 or fp8 for quantised pages, with ``k_scale`` and
            ``v_scale``: a stored element times its scale is K or V), ``kernel_block_size``, ``device``; see
            ``KVCacheConfig``.
        cache_sharding: where on a mesh the pages lie, KV heads over one axis and tokens over another; a mesh with axes
            "tp" and "dcp" will do. None: on one device. Kernels lie where ``nn.with_partitioning`` puts them.
    """

    num_kv_heads: int | None = None
    sliding_window: int | None = None
    rope: Rope | None = None
    cache_options: Mapping[str, Any] = FrozenDict()
    cache_sharding: CacheSharding | Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_options", static_options(self.cache_options))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        inputs_kv: jax.Array | None = None,
        lengths: ArrayLike | None = None,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> jax.Array:
        """Attention; in decode over all that the rows hold, this call's tokens last, each seeing those before it.

        Args:
            inputs_q: [batch, n, features]; several leading axes are rows in all.
            inputs_k: [batch, n, features]; None: ``inputs_q``.
            inputs_v: likewise; None: ``inputs_k``.
            inputs_kv: both, as in Linen.
            lengths: i32[batch], in decode: how many of the n tokens of each row are real, the first ones. None: all.
            mask: as in Linen, and so the rest. In decode ``mask``, ``sow_weights``, dropout that is not switched off
                and an ``attention_fn`` or einsums of one's own are refused: pages are read by kernels.
            deterministic: as in Linen.
            dropout_rng: as in Linen.
            sow_weights: as in Linen.

        Returns:
            [batch, n, out_features]. In decode, padding gives what the output projection makes of zeros, and a row for
            which there were no blocks left gives NaN (under ``jit``), and keeps what it had. In ``init``, attention
            without a cache.

        Raises:
            ShapeMismatchError: inputs that do not fit the cache, or a cache that does not fit the module.
            InvalidArgumentError: no cache, one that may not change, or an option that decode cannot honour.
            RequestTooLongError, OutOfBlocksError: (outside ``jit``; inside, the row gives NaN) a row that outgrows the
                cache, or for which there are no blocks left.
            ConfigError: heads or options that no cache can be made of.
        """
        options: dict[str, Any] = {"mask": mask, "dropout_rng": dropout_rng}
        options |= {"deterministic": deterministic, "sow_weights": sow_weights}
        if not self.decode:
            if lengths is not None:
                raise InvalidArgumentError(f"lengths: got {lengths!r} without decode, want a mask there")
            if self.num_kv_heads in (None, self.num_heads) and self.rope is None:
                return super().__call__(inputs_q, inputs_k, inputs_v, **{"inputs_kv": inputs_kv, **options})
        inputs = self._inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        if not self.decode or self.is_initializing():
            q, k, v = self._projected(*inputs)
            if self.decode:
                self.variable("cache", "paged_cache", self._new_cache, k)
            return self._out(self._attend_without_cache(q, k, v, **options), inputs_q.shape[-1])
        self._check_options(options)
        cache = self._checked_cache(inputs_q)
        owner = self._owner(inputs_q)
        counts = checked_counts(owner, cache, inputs, lengths)
        q, k, v = self._projected(*inputs)
        out, cache = attend_padded(owner, cache, q, k, v, counts, rope=self.rope, sliding_window=self.sliding_window)
        self.put_variable("cache", "paged_cache", cache)
        return self._out(out, inputs_q.shape[-1])

    # -- layers, named as Linen's --------------------------------------------------------------------------------

    def _projected(self, inputs_q: jax.Array, inputs_k: jax.Array, inputs_v: jax.Array) -> Any:
        """Q, K and V [..., n, heads, head_dim]."""
        heads, kv_heads, head_dim = self._heads(inputs_q)
        dense = partial(
            nn.DenseGeneral,
            axis=-1,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
            **self._numbers(),
        )
        q = dense(features=(heads, head_dim), name="query")(inputs_q)
        k = dense(features=(kv_heads, head_dim), name="key")(inputs_k)
        v = dense(features=(kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            norm = partial(nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            q, k = norm(name="query_ln")(q), norm(name="key_ln")(k)
        return q, k, v

    def _out(self, attended: jax.Array, features: int) -> jax.Array:
        return nn.DenseGeneral(
            features=self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
            **self._numbers(),
        )(attended)

    def _numbers(self) -> dict[str, Any]:
        return {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

    def _attend_without_cache(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, sow_weights: bool, deterministic: bool | None, **options: Any
    ) -> jax.Array:
        """What Linen's own call does with Q, K and V; K and V may have fewer heads."""
        if self.rope is not None:
            q, k = (turned(self.rope, x) for x in (q, k))
        if self.dropout_rate > 0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
            if not deterministic and options["dropout_rng"] is None:
                options["dropout_rng"] = self.make_rng("dropout")
        else:
            deterministic = True
        for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum"):
            made_by = getattr(self, f"{name}_cls")
            options[name] = made_by() if made_by else None
        fields = ("dropout_rate", "broadcast_dropout", "dtype", "precision", "force_fp32_for_softmax")
        options |= {"deterministic": deterministic, **{name: getattr(self, name) for name in fields}}
        known = inspect.signature(self.attention_fn).parameters
        options = {name: value for name, value in options.items() if name in known}
        if sow_weights:
            options["module"] = self
        k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
        return self.attention_fn(q, k, v, **options)

    # -- the cache -----------------------------------------------------------------------------------------------

    def _new_cache(self, k: jax.Array) -> PagedKVCache:
        *rows, most_tokens, kv_heads, head_dim = k.shape
        sharding = None if self.cache_sharding is None else CacheSharding.of(self.cache_sharding)
        owner = CacheOwner(self._name(), _REMEDY, kv_heads, head_dim)
        return create_private_cache(owner, math.prod(rows), most_tokens, k.dtype, self.cache_options, sharding)

    def _checked_cache(self, inputs_q: jax.Array) -> PagedKVCache:
        for missing, got in (
            (not self.has_variable("cache", "paged_cache"), "without a cache"),
            (not self.is_mutable_collection("cache"), "with a cache that may not change"),
        ):
            if missing:
                raise InvalidArgumentError(
                    f"{self._name()}: got decode=True {got}, want apply({{'params': ..., 'cache': ...}}, ..., "
                    f"mutable=['cache']); {_REMEDY}"
                )
        return check_cache(self._owner(inputs_q), self.get_variable("cache", "paged_cache"))

    def _owner(self, inputs_q: jax.Array) -> CacheOwner:
        _, kv_heads, head_dim = self._heads(inputs_q)
        return CacheOwner(self._name(), _REMEDY, kv_heads, head_dim)

    def _name(self) -> str:
        return f"{type(self).__name__} at {'/'.join(self.path) or 'the root'}"

    def _heads(self, inputs_q: jax.Array) -> tuple[int, int, int]:
        """(heads, KV heads, head_dim)."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        features = self.qkv_features or inputs_q.shape[-1]
        if kv_heads < 1 or self.num_heads % kv_heads or features % self.num_heads:
            raise ConfigError(
                f"{self._name()}: got {features} features, {self.num_heads} heads and {kv_heads} KV heads, want the "
                f"heads to divide the features, and the KV heads to divide the heads"
            )
        return self.num_heads, kv_heads, features // self.num_heads

    # -- what is refused -----------------------------------------------------------------------------------------

    def _inputs(
        self, q: jax.Array, k: jax.Array | None, v: jax.Array | None, kv: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Inputs of Q, K and V, those that were left out filled in as in Linen."""
        if (kv is not None and (k is not None or v is not None)) or (kv is None and k is None and v is not None):
            raise InvalidArgumentError(
                f"{self._name()}: got inputs_v without inputs_k, or either beside inputs_kv, want one way or the other"
            )
        k = (q if kv is None else kv) if k is None else k
        return q, k, k if v is None else v

    def _check_options(self, options: dict[str, Any]) -> None:
        """That nothing is asked of decode that a kernel over pages cannot do."""
        refused = {
            "mask": options["mask"] is not None,
            "sow_weights": options["sow_weights"],
            "attention_fn": self.attention_fn is not nn.dot_product_attention,
            "qk_attn_weights_einsum_cls": self.qk_attn_weights_einsum_cls is not None,
            "attn_weights_value_einsum_cls": self.attn_weights_value_einsum_cls is not None,
            "dropout": self.dropout_rate > 0 and not (self.deterministic or options["deterministic"]),
        }
        if any(refused.values()):
            wrong = [name for name, given in refused.items() if given]
            raise InvalidArgumentError(f"{self._name()}: got {', '.join(wrong)} in decode, want it without")


class MultiHeadDotProductAttention(PagedMultiHeadDotProductAttention):
    """The same under Linen's own name, from which Linen makes up the names of layers that are given none.

    So a model that imports it from here instead of from ``flax.linen`` loads its old checkpoints.
    """


class MultiHeadAttention(PagedMultiHeadDotProductAttention):
    """The same under the other name that Linen has for it."""


_REMEDY = "init(key, jnp.ones((rows, most tokens, features)))['cache'] makes another"
