"""A ``PagedKVCache`` in ``flax.serialization``, so that a ``cache`` collection goes to bytes and back like Linen's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from pyagent_kv_jax.cache.paged_kv_cache import PagedKVCache
from pyagent_kv_jax.errors import ShapeMismatchError


def to_state_dict(cache: PagedKVCache) -> dict[str, Any]:
    """Its arrays by where they stand in it, ``pages.k_pages`` and so on. Sizes are not among them."""
    return _by_name(cache)[0]


def from_state_dict(target: PagedKVCache, state: dict[str, Any]) -> PagedKVCache:
    """``target`` with the arrays of ``state``, each put where the one it replaces lies.

    Raises:
        ShapeMismatchError: arrays of a cache of other sizes.
    """
    wanted, treedef = _by_name(target)
    for name in sorted(state.keys() | wanted.keys()):
        got, want = _shape(state.get(name)), _shape(wanted.get(name))
        if got != want:
            raise ShapeMismatchError(f"{name}: got {got}, want {want}, for a cache of {target.config}")
    return jax.tree.unflatten(treedef, [_like(state[name], wanted[name]) for name in wanted])


def _by_name(cache: PagedKVCache) -> tuple[dict[str, Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(cache)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}, treedef


def _shape(x: Any) -> str:
    return "nothing" if x is None else f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def _like(value: Any, present: Any) -> Any:
    return jax.device_put(value, present.sharding) if isinstance(present, jax.Array) else value


serialization.register_serialization_state(PagedKVCache, to_state_dict, from_state_dict)
