"""What every attention over a mesh does alike: run on each rank, split options, count sinks once, check heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import ShapeMismatchError


def on_ranks(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``jax.shard_map`` without ``check_vma``: kernels and loops do not say over which axes what they carry varies."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def static_and_arrays(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of attention: those that are part of the program, and those that are arrays, traced or not."""
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    return {name: value for name, value in options.items() if name not in arrays}, arrays


def sinks_of_rank(sinks: jax.Array | None, rank: ArrayLike) -> jax.Array | None:
    """``sinks`` on rank 0 alone: they must be counted in one partial attention only."""
    return None if sinks is None else jnp.where(rank == 0, sinks, -jnp.inf)


def check_kv_heads(config: KVCacheConfig, k: jax.Array, v: jax.Array) -> None:
    """Raise ``ShapeMismatchError`` unless ``k`` and ``v`` are of the cache's heads.

    Before heads are repeated or split, so that the message speaks of what was given.
    """
    for name, value, width in (("k", k, config.head_dim), ("v", v, config.value_head_dim)):
        if value.ndim != 3 or value.shape[1:] != (config.num_heads, width):
            raise ShapeMismatchError(
                f"{name}: got shape {list(value.shape)}, want [tokens, {config.num_heads}, {width}]"
            )
