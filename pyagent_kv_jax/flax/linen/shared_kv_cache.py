"""One paged cache that all layers of a Linen model share, in the ``cache`` collection.

>>> @partial(jax.jit, donate_argnums=1)
... def step(params, cache, tokens, lens):
...     cache, meta = cache.extend(lens, num_tokens=tokens.size)     # tokens of all rows, one row after another
...     logits, cache = apply_with_cache(                            # each layer: attend(self, layer, q, k, v)
...         model, {"params": params}, cache, meta, tokens[None], meta.positions[None]
...     )
...     return logits[0], meta.ok, cache

The collection stands at the root of what is applied, where every module below finds it, also where the model's
``__call__`` is under ``nn.jit``. With the cache donated to the ``jax.jit`` around, pages are written in place.

``nn.scan``, ``nn.remat`` and ``nn.jit`` of a *part* of a model show that part its own variables only. There are two
ways through them, both in place:

- carry ``(x, cache)`` through the part's arguments and results, and call ``cache.attend(layer, q, k, v, meta)`` in it;
- put the collection where the part stands (``{"layers": cache_collection(cache, meta)}`` for a part named "layers"),
  and scan with ``variable_carry="cache"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.flax.cache_in_step import CacheInStep

_COLLECTION, _NAME = "cache", "paged_kv_cache"


def apply_with_cache(
    model: nn.Module,
    variables: Mapping[str, Any],
    cache: Any,
    meta: AttentionMetadata,
    *args: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """``model.apply(variables, *args, **options)`` with a paged cache, in which every layer may ``attend``.

    Args:
        model: any Linen module, bound to nothing.
        variables: without a ``cache`` collection, ``{"params": params}`` say.
        cache: as for ``cache_collection``.
        meta: of this step, from ``cache.extend``.
        *args: of the model.
        **options: of the model.

    Returns:
        (what the model returns, the new cache).

    Raises:
        InvalidArgumentError: a ``cache`` collection there already.
    """
    if _COLLECTION in variables:
        raise InvalidArgumentError(
            f"{type(model).__name__}: got variables with a collection {_COLLECTION!r} of their own, want them without, "
            f"as the paged cache stands there"
        )
    variables = {**variables, _COLLECTION: cache_collection(cache, meta)}
    out, changed = model.apply(variables, *args, mutable=[_COLLECTION], **options)
    return out, cache_of(changed[_COLLECTION])


def cache_collection(cache: Any, meta: AttentionMetadata) -> dict[str, CacheInStep]:
    """The ``cache`` collection to apply a model with.

    Args:
        cache: ``PagedKVCache``, or pages alone, as ``KVPages``, where another keeps the tables.
        meta: of this step, from ``cache.extend``. Rows with ``meta.ok`` false are written nowhere and get zeros: throw
            away what the model makes of them.
    """
    return {_NAME: CacheInStep(cache, meta)}


def cache_of(collection: Mapping[str, Any]) -> Any:
    """The cache in the ``cache`` collection that ``apply(..., mutable=["cache"])`` gives back.

    Raises:
        InvalidArgumentError: there is none.
    """
    if _NAME not in collection:
        raise InvalidArgumentError(
            f'cache_of: got a collection of {sorted(collection)}, want changed["cache"] of a model that was applied '
            f"with cache_collection(cache, meta)"
        )
    cache: Any = collection[_NAME].cache
    return cache


def has_cache(module: nn.Module) -> bool:
    """Whether ``module`` was applied with a paged cache, so that ``attend`` finds one."""
    return module.scope is not None and module.scope.root.has_variable(_COLLECTION, _NAME)


def attend(module: nn.Module, layer: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """Store K and V of one layer, then attend, causally, over all that the rows hold.

    Args:
        module: the one that calls, or any other of the same ``apply``.
        layer: i32[], may be traced.
        q: [..., q_heads, head_dim], any leading axes, [1, T] or [R, 1] say, whose product is the step's tokens.
        k: [..., kv_heads, head_dim], the same leading axes.
        v: [..., kv_heads, v_head_dim], the same leading axes.
        **options: ``scale``, ``sliding_window``, ``chunk_size``, ``logits_soft_cap``, ``sinks``: see
            ``KVPages.attend``.

    Returns:
        [..., q_heads, v_head_dim] of q's dtype. In ``model.init`` without a cache, zeros: only shapes matter there.

    Raises:
        InvalidArgumentError: no cache where ``module`` is applied, one that is not mutable, or no such layer.
        ShapeMismatchError: shapes that do not fit the cache or the step's tokens.
    """
    name = type(module).__name__ if module.scope is None else f"{type(module).__name__} {'/'.join(module.path)}".strip()
    if module.scope is not None and module.is_initializing() and not has_cache(module):
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    if module.scope is None or not has_cache(module):
        raise InvalidArgumentError(
            f"{name}: got attend() without a paged cache, want apply_with_cache(model, variables, cache, meta, ...); "
            f"under nn.scan, nn.remat or nn.jit of a part of the model see pyagent_kv_jax.flax.linen.shared_kv_cache"
        )
    root = module.scope.root
    if not root.is_mutable_collection(_COLLECTION):
        raise InvalidArgumentError(f'{name}: got a cache that cannot be written, want apply(..., mutable=["cache"])')
    out, in_step = root.get_variable(_COLLECTION, _NAME).attend(name, layer, q, k, v, **options)
    root.put_variable(_COLLECTION, _NAME, in_step)
    return out
