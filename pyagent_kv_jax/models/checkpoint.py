"""The tensors of a Hugging Face directory, wherever its shards keep them, and what they are called there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pyagent_kv_jax.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelLoadError: no such file, or something else inside it.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path}: got no such file, want a JSON file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path}: got {error}, want JSON") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: got a {type(content).__name__}, want a JSON object")
    return content


class Checkpoint:
    """Tensors by name, over one file or several; nothing is read before it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        """``places``: for each tensor its shard, and its name there."""
        self._places = places

    def renamed(self, rule: Callable[[str], str | None]) -> Checkpoint:
        """The same tensors under the names that ``rule`` gives them, without those to which it gives None.

        Raises:
            ModelLoadError: two tensors of one name.
        """
        places: dict[str, tuple[Any, str]] = {}
        for stored in sorted(self._places):
            name = rule(stored)
            if name in places:
                raise ModelLoadError(f"checkpoint: got tensors {places[name][1]} and {stored}, want one {name}")
            if name is not None:
                places[name] = self._places[stored]
        return Checkpoint(places)

    def names(self) -> set[str]:
        """Every tensor in the files."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        shard, stored = self._places[name]
        return tuple(shard.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Its values, in the type they are stored in."""
        shard, stored = self._places[name]
        return shard.get_tensor(stored)


@contextlib.contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Open ``model.safetensors``, or every shard that ``model.safetensors.index.json`` names.

    Raises:
        ModelLoadError: neither file is there, a shard is missing or broken, or lacks a tensor that the index
            gives it.
    """
    files, promised = _files(directory)
    with contextlib.ExitStack() as stack:
        shards = {name: _open_shard(stack, directory / name) for name in files}
        places = {tensor: (shard, tensor) for shard in shards.values() for tensor in shard.keys()}  # noqa: SIM118
        missing = sorted(set(promised) - set(places))
        if missing:
            wanted = {promised[name] for name in missing}
            raise ModelLoadError(f"{directory / INDEX_FILE}: got no {_some(missing)}, want them in {_some(wanted)}")
        yield Checkpoint(places)


def _files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """File names to open, and (for an index) which tensor it promises in which."""
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if not (directory / INDEX_FILE).is_file():
        raise ModelLoadError(f"{directory}: got neither, want {SINGLE_FILE} or {INDEX_FILE}")
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{directory / INDEX_FILE}: got weight_map {weight_map!r}, want tensor to file name")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ModelLoadError(f"{directory / INDEX_FILE}: got {_some(outside)}, want names of files beside the index")
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise ModelLoadError(f"{directory}: got no shard {_some(absent)}, want all {len(files)} of the index")
    return files, weight_map


def _open_shard(stack: contextlib.ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: got {error}, want a safetensors file") from error


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How one of our parameters lies in a Hugging Face checkpoint.

    Attributes:
        names: of its tensors: one, or one a layer where ours is stacked.
        stacked: whether ours has a leading axis of layers.
        transposed: whether ours is [in, out] where theirs is [out, in].
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @classmethod
    def of(cls, path: Sequence[Any], num_layers: int) -> TensorLayout:
        """Of the parameter at ``path`` in the module tree; but for the leaf its names are Hugging Face's own."""
        modules, leaf = [str(part) for part in path[:-1]], str(path[-1])
        stacked, transposed = modules[0] == "layers", leaf == "kernel"
        tail = [*modules[1:], "weight" if transposed else leaf]
        if stacked:
            heads = [["model", "layers", str(layer)] for layer in range(num_layers)]
        else:
            heads = [["lm_head"] if modules[0] == "lm_head" else ["model", modules[0]]]
        return cls(tuple(".".join(head + tail) for head in heads), stacked, transposed)

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor, when ours has ``shape``."""
        one = shape[1:] if self.stacked else shape
        return one[::-1] if self.transposed else one

    def views(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Name of each tensor, and where it lies in ``value``, shaped like the tensor."""
        layers = value if self.stacked else value[None]
        return ((name, one.T if self.transposed else one) for name, one in zip(self.names, layers, strict=True))


def check_names(found: set[str], wanted: set[str], *, tied: bool) -> None:
    """Refuse what is missing and what nobody would read.

    Rotary frequencies, which old checkpoints carry, follow from the config; a tied output projection from the
    embedding.

    Raises:
        ModelLoadError: with some of the names.
    """
    missing = sorted(wanted - found)
    if missing:
        raise ModelLoadError(f"checkpoint: got no tensor {_some(missing)}, want all {len(wanted)} of the model")
    derived = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    leftover = sorted(found - wanted - derived - ({"lm_head.weight"} if tied else set()))
    if leftover:
        raise ModelLoadError(f"checkpoint: got tensors {_some(leftover)}, want none besides the model's own")


def _some(names: Sequence[str] | set[str], most: int = 4) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
