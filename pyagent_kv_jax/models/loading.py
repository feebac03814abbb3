"""A model from a Hugging Face directory, and back into one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from pyagent_kv_jax.config import DeviceType
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models.checkpoint import (
    SINGLE_FILE,
    Checkpoint,
    TensorLayout,
    check_names,
    open_checkpoint,
    read_json,
)
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.hf_config import config_from_hf, config_to_hf, token_ids
from pyagent_kv_jax.models.hf_gemma3 import has_vision_tower, text_tensor_name
from pyagent_kv_jax.models.llama import LlamaForCausalLM
from pyagent_kv_jax.models.sharding import place_weight

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def load_config(directory: str | os.PathLike[str]) -> LlamaConfig:
    """Sizes and switches from ``config.json``; stop tokens from ``generation_config.json`` where it has them.

    Raises:
        ModelLoadError: no such directory, no or broken JSON, or a model that is not supported.
    """
    path = _existing(directory)
    config = config_from_hf(read_json(path / "config.json"))
    if (path / "generation_config.json").is_file():
        generation = read_json(path / "generation_config.json")
        eos = token_ids(generation.get("eos_token_id")) or config.eos_token_ids
        config = dataclasses.replace(config, eos_token_ids=eos)
    return config


def load_model(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: jax.Device | None = None,
    sharding: CacheSharding | None = None,
) -> tuple[LlamaForCausalLM, LlamaConfig]:
    """Load ``config.json`` and ``*.safetensors``.

    Names and shapes of all tensors are checked before the first is read. Each tensor goes straight to its
    place in the stacked layout: besides the model itself, the host holds one stacked parameter at a time.

    Of a Gemma 3 with a vision tower (``model_type`` "gemma3") the text part is loaded; the tensors of the tower and
    of its projection are left unread on purpose. Any other tensor that nobody would read is an error.

    Args:
        directory: as ``huggingface_hub`` or ``save_pretrained`` leave it.
        dtype: of the parameters in memory. None: float32 on CPUs, bfloat16 elsewhere.
        device: where they go. None: JAX's default device.
        sharding: of the cache they will work with, instead of ``device``: each goes straight to its place on the mesh,
            see ``shard_model``.

    Raises:
        ConfigError: query heads that the mesh's axes do not divide.
        ModelLoadError: a missing directory, file, shard or tensor, an unknown architecture, a wrong shape or
            dtype, a tensor nobody would read.
    """
    path = _existing(directory)
    config = load_config(path)
    if dtype is None:
        dtype = jnp.float32 if DeviceType.default() is DeviceType.CPU else jnp.bfloat16
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    with open_checkpoint(path) as checkpoint:
        if has_vision_tower(read_json(path / "config.json")):
            checkpoint = checkpoint.renamed(text_tensor_name)
        loaded = _read_all(checkpoint, abstract, config, device if sharding is None else sharding)
    return nnx.merge(graph, loaded), config


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in ``tokenizer.json``.

    Raises:
        ModelLoadError: no such directory or file, or one that ``tokenizers`` cannot read.
    """
    path = _existing(directory) / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{path}: got no such file, want a tokenizer of the tokenizers library")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{path}: got {error}, want a tokenizer of the tokenizers library") from error


def save_model(model: LlamaForCausalLM, directory: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors``, as ``load_model`` and transformers read them.

    Raises:
        ConfigError: a config that the architecture's ``config.json`` cannot express; nothing is written.
    """
    raw = config_to_hf(model.config)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for place, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        views = TensorLayout.of(place, model.config.num_layers).views(np.asarray(param[...]))
        tensors |= {name: np.ascontiguousarray(view) for name, view in views}
    save_file(tensors, path / SINGLE_FILE, metadata={"format": "pt"})  # transformers refuses files without it
    dtype = {"torch_dtype": str(next(iter(tensors.values())).dtype)}
    (path / "config.json").write_text(json.dumps({**raw, **dtype}, indent=2) + "\n")


def _existing(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory)
    if not path.is_dir():
        raise ModelLoadError(f"got {str(directory)!r}, which is no directory; want a Hugging Face model directory")
    return path


def _read_all(checkpoint: Checkpoint, abstract: nnx.State, config: LlamaConfig, where: Any) -> nnx.State:
    flat = [(place, param, TensorLayout.of(place, config.num_layers)) for place, param in nnx.to_flat_state(abstract)]
    wanted = {name for _, _, layout in flat for name in layout.names}
    check_names(checkpoint.names(), wanted, tied=config.tie_word_embeddings)
    for _, param, layout in flat:
        _check_shapes(checkpoint, layout, param.shape)

    def load(path: tuple[Any, ...], param: Any, layout: TensorLayout) -> Any:
        value = _read(checkpoint, layout, param)
        if isinstance(where, CacheSharding):
            return param.replace(place_weight(path, value, where, config))
        return param.replace(jax.device_put(value, where))

    return nnx.from_flat_state((path, load(path, param, layout)) for path, param, layout in flat)


def _check_shapes(checkpoint: Checkpoint, layout: TensorLayout, shape: tuple[int, ...]) -> None:
    wanted = layout.tensor_shape(shape)
    for name in layout.names:
        if checkpoint.shape(name) != wanted:
            raise ModelLoadError(f"tensor {name}: got shape {checkpoint.shape(name)}, want {wanted} by config.json")


def _read(checkpoint: Checkpoint, layout: TensorLayout, param: Any) -> np.ndarray:
    """One parameter, in the shape and dtype of ``param``."""
    value = np.empty(param.shape, param.dtype)
    for name, view in layout.views(value):
        tensor = checkpoint.read(name)
        if tensor.dtype.name not in _FLOATS:
            raise ModelLoadError(f"tensor {name}: got dtype {tensor.dtype}, want one of {', '.join(_FLOATS)}")
        view[...] = tensor
    return value
