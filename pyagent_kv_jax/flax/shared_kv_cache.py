"""One paged cache that all layers of an NNX model share by reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.flax.cache_in_step import CacheInStep


class SharedKVCache(nnx.Variable):
    """A ``PagedKVCache`` and the metadata of the step it is in, as one ``nnx.Variable``.

    Layers that hold it, or a handle of it, write into it, so a model whose layers take no ``(cache, meta)`` needs no
    other signature. Around each step, outside the model, the cache stays a plain pytree that ``jit`` donates:

    >>> graph, params = nnx.split(model)
    >>> @partial(jax.jit, donate_argnums=1)
    ... def step(params, cache, tokens, lens):
    ...     shared = SharedKVCache(cache)
    ...     meta = shared.extend(lens, num_tokens=tokens.size)             # tokens of all rows, one row after another
    ...     handles = shared.layers(f"layer_{i}" for i in range(num_layers))
    ...     logits = nnx.merge(graph, params)(tokens[None], meta.positions[None], handles)
    ...     return logits[0], meta.ok, shared.cache                        # each layer: cache.attend(q, k, v)

    It may also be an attribute of the model and of its layers. It then goes through ``nnx.split`` and ``merge``
    (its type is its filter), ``nnx.jit`` (donate it) and ``nnx.remat`` like any ``Variable``, and through ``nnx.scan``
    as ``nnx.Carry``, in place. Call ``end_step()`` before such a model leaves the ``jit``: metadata that is taken along
    makes the next step another shape, and ``attend`` without ``extend`` could not be told from one with it.

    Rows that ``extend`` refuses (no blocks left, too long) keep what they had: their tokens are written nowhere, attend
    to nothing and get zeros. Outside ``jit`` that raises; inside, ``meta.ok`` bool[R] of what ``extend`` returns is all
    that says so: return it from the step, and throw away what the model made of a row that is not ok.

    Args:
        cache: ``PagedKVCache``, on one device or over ``distributed.ShardedKVPages``. Or pages alone, whose tables
            another keeps (``KVCacheManager``, ``serving.generate``), with the ``meta`` that other made.
        meta: of a step that has begun already. None: ``extend`` begins one.
        **metadata: of the ``nnx.Variable``.
    """

    def __init__(self, cache: Any, meta: AttentionMetadata | None = None, **metadata: Any) -> None:
        super().__init__(CacheInStep(cache, meta), **metadata)

    @property
    def cache(self) -> Any:
        """The plain cache, as it is now."""
        return self._in_step.cache

    @property
    def meta(self) -> AttentionMetadata | None:
        """The metadata of this step; None between two."""
        return self._in_step.meta

    def extend(
        self, lens: ArrayLike, num_tokens: int | None = None, *, order: jax.Array | None = None
    ) -> AttentionMetadata:
        """Begin a step: make room for its tokens, once for all layers. See ``PagedKVCache.extend``.

        Args:
            lens: i32[R], new tokens of each row, 0 for rows that take no part.
            num_tokens: static; T, tokens of the step, in which the rows' tokens stand one row after another. None:
                decode layout, token r belongs to row r.
            order: i32[R], rows in the order they are served; None: 0 to R - 1.

        Returns:
            The metadata: ``positions`` i32[T] for the model, ``ok`` bool[R].

        Raises:
            InvalidArgumentError: not one count a row; or pages alone.
            InvalidArgumentError, RequestTooLongError, OutOfBlocksError: (outside ``jit``; inside, ``ok`` says so) a
                row is refused. Nothing has changed.
        """
        in_step = self._in_step.extend(type(self).__name__, lens, num_tokens, order)
        self.set_value(in_step)
        assert in_step.meta is not None
        return in_step.meta

    def attend(self, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
        """Store K and V of one layer, then attend, causally, over all that the rows hold.

        Args:
            layer: i32[], may be traced.
            q: [..., q_heads, head_dim], any leading axes, [1, T] or [R, 1] say, whose product is the step's tokens.
            k: [..., kv_heads, head_dim], the same leading axes.
            v: [..., kv_heads, v_head_dim], the same leading axes.
            **options: ``scale``, ``sliding_window``, ``chunk_size``, ``logits_soft_cap``, ``sinks``: see
                ``KVPages.attend``.

        Returns:
            [..., q_heads, v_head_dim] of q's dtype.

        Raises:
            InvalidArgumentError: no ``extend`` in this step, or no such layer.
            ShapeMismatchError: shapes that do not fit the cache or the step's tokens.
        """
        out, in_step = self._in_step.attend(type(self).__name__, layer, q, k, v, **options)
        self.set_value(in_step)
        return out

    def layer(self, index: int) -> LayerHandle:
        """What stands for layer ``index`` where a model expects a layer's own cache."""
        return LayerHandle(self, index)

    def layers(self, names: Iterable[str]) -> dict[str, LayerHandle]:
        """Handles of layers 0, 1, ... under ``names``, for models that take a dict of caches."""
        return {name: LayerHandle(self, index) for index, name in enumerate(names)}

    def end_step(self) -> Any:
        """Forget the step's metadata. Returns the plain cache."""
        cache = self._in_step.cache
        self.set_value(CacheInStep(cache))
        return cache

    @property
    def _in_step(self) -> CacheInStep:
        value: CacheInStep = self.get_value()
        return value


class LayerHandle(nnx.Module):
    """One layer of a ``SharedKVCache``, by reference: an NNX object that goes wherever a layer's own cache would.

    Attributes:
        shared: the cache, the same one in every handle.
        index: of the layer; static.
    """

    def __init__(self, shared: SharedKVCache, index: int) -> None:
        self.shared, self.index = shared, index

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, LayerHandle]:
        """As ``SharedKVCache.attend``. The handle itself comes back too, as a layer's new cache."""
        return self.shared.attend(self.index, q, k, v, **options), self
