"""Where on a mesh a model's weights lie: heads and hidden units spread, so that each device computes its share."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.models.config import LlamaConfig

Model = TypeVar("Model", bound=nnx.Module)

_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_BY_INPUT = ("o_proj", "down_proj")


def shard_model(model: Model, sharding: CacheSharding) -> Model:
    """``model`` with its weights on the mesh; weights that lie on it already stay as they are.

    Those of a Llama-like model (``LlamaConfig``) are spread as Megatron-LM does (Shoeybi et al., arXiv 1909.08053):
    attention by heads, as the cache, queries also over the context axis; the MLP and the vocabulary over both axes, or
    over the tensor axis, whichever divides. Of other models, parameters stay where ``nnx.with_partitioning`` has put
    them on this mesh, and all else is the same on every device.

    Raises:
        ConfigError: query heads that the axes do not divide.
    """
    graph, state = nnx.split(model)
    config = getattr(model, "config", None)

    def place(path: tuple[Any, ...], value: Any) -> jax.Array:
        names = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        return place_weight(names, value, sharding, config)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(place, state))


def place_weight(path: tuple[Any, ...], value: Any, sharding: CacheSharding, config: Any) -> jax.Array:
    """The parameter of this path, from the host or a device, on the mesh."""
    present = getattr(value, "sharding", None)
    if isinstance(present, NamedSharding) and _is_same(present.mesh, sharding.mesh):
        return jax.device_put(value, sharding.named(present.spec))  # its axes may be Explicit
    spec = weight_spec(path, value.shape, sharding, config) if isinstance(config, LlamaConfig) else P()
    place = sharding.named(spec)
    if place.is_fully_addressable:
        return jax.device_put(value, place)
    host = np.asarray(value)  # every process has all of it, and puts in its place what is its own
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def weight_spec(path: tuple[Any, ...], shape: tuple[int, ...], sharding: CacheSharding, config: LlamaConfig) -> Any:
    """PartitionSpec of a parameter of ``LlamaForCausalLM``: kernels are [..., inputs, outputs], biases [..., outputs].

    Args:
        path: of the parameter, ``("layers", "self_attn", "q_proj", "kernel")``, say.
        shape: its.
        sharding: of the cache.
        config: of the model.
    """
    layer, leaf = ("", *path)[-2:]
    if layer in _BY_INPUT:
        if leaf == "bias":  # added to the sum over all ranks
            return P()
        axis = -2
    elif layer in _BY_OUTPUT:
        axis = -1
    elif layer == "embed_tokens":
        axis = 0
    else:
        return P()
    if layer in ("q_proj", "o_proj"):
        axes = sharding.q_head_axes(config.num_heads)
    elif layer in ("k_proj", "v_proj"):
        axes = _dividing(config.num_kv_heads, (sharding.tensor_axis,), sharding)
    else:
        axes = _dividing(shape[axis], (sharding.tensor_axis, sharding.context_axis), sharding)
    spec: list[Any] = [None] * len(shape)
    spec[axis] = axes or None
    return P(*spec)


def _is_same(mesh: Any, other: Mesh) -> bool:
    """Whether two meshes are the same devices under the same names."""
    return mesh.axis_names == other.axis_names and np.array_equal(mesh.devices, other.devices)


def _dividing(size: int, axes: tuple[str | None, ...], sharding: CacheSharding) -> tuple[str, ...]:
    """The longest beginning of ``axes`` whose ranks divide ``size``."""
    named = [axis for axis in axes if axis is not None]
    while named and size % math.prod(sharding.mesh.shape[axis] for axis in named):
        named.pop()
    return tuple(named)
