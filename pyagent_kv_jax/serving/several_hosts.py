"""Serving on a mesh of several processes: process 0 decides, the others run what it runs.

Only process 0 has a scheduler and a manager. Before it runs a program on the mesh it tells the others which one, and
with what: a step's tokens, tables and sampling, or the blocks to copy or clear. So nothing that a host knows for itself
(clocks, hash seeds, the order of threads) can make two processes decide differently, and none ever waits in a
collective that another skips. Every so many steps all compare what they were told and what came of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
from flax import nnx, serialization
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pyagent_kv_jax import errors
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.kv_pages import PAGE_MOVES
from pyagent_kv_jax.distributed.replicas import check_replicas
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, KVCacheError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.serving.compiled_step import CompiledStep, StepOutput, split_model
from pyagent_kv_jax.serving.sampling import SamplingArrays

STEPS_BETWEEN_CHECKS = 64
_Result = TypeVar("_Result")


def spans_processes(mesh: Mesh) -> bool:
    """Whether devices of the mesh belong to other processes than this one.

    Raises:
        ConfigError: it has devices of some of the processes only, or none of this one.
    """
    members = {device.process_index for device in mesh.devices.flat}
    if members == {jax.process_index()}:
        return False
    if members != set(range(jax.process_count())):
        raise ConfigError(
            f"mesh: got devices of processes {sorted(members)}, want of all {jax.process_count()}, or of this one, "
            f"{jax.process_index()}, alone"
        )
    return True


class Told:
    """What process 0 says to all, and a record of it. Every method is called by all processes alike, in one order.

    Attributes:
        is_source: whether this is process 0.
        tokens: i32[rows], what this process has of the tokens that the last step chose; None before the first.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.is_source = jax.process_index() == 0
        self.tokens: Any = None
        self._mesh = mesh
        self._record = hashlib.sha256()

    @classmethod
    def of(cls, backend: KVCacheManager) -> Self:
        """One for as long as the cache lives: what it holds comes of all that was ever said."""
        if backend not in _TOLD:
            assert backend.sharding is not None
            _TOLD[backend] = cls(backend.sharding.mesh)
        return _TOLD[backend]

    def say(self, kind: str, **content: Any) -> tuple[str, dict[str, Any]]:
        """Process 0's ``kind`` and ``content`` (numpy arrays, numbers, strings, lists and dicts), on every process.

        The others call it with anything; what they give is not looked at.
        """
        message = serialization.msgpack_serialize({"kind": kind, "content": content}) if self.is_source else b""
        size = int(_broadcast(np.array([len(message)], np.int32))[0])
        words = np.zeros(1 << (size - 1).bit_length(), np.uint8)  # few sizes: each is a program of its own
        words[: len(message)] = np.frombuffer(message, np.uint8)
        received = _broadcast(words)[:size].tobytes()
        self._record.update(received)
        said = serialization.msgpack_restore(received)
        return said["kind"], said["content"]

    def check_alike(self, what: str, **values: Any) -> None:
        """Raise on every process unless ``values``, ``tokens`` and all that was said so far are the same on all.

        Raises:
            ReplicaDriftError: they are not; it names the value.
        """
        said = np.frombuffer(self._record.digest(), np.uint8)
        check_replicas({what: {"said": said, "tokens": self.tokens, **values}}, self._mesh)


_TOLD: weakref.WeakKeyDictionary[KVCacheManager, Any] = weakref.WeakKeyDictionary()


def _broadcast(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


class ToldStep(CompiledStep):
    """A step of process 0, which tells the others before it runs."""

    def __init__(self, step: CompiledStep, told: Told) -> None:
        super().__init__(self._run)
        self._step, self._told, self._count = step, told, 0

    def _run(
        self,
        weights: Any,
        pages: Any,
        tokens: np.ndarray,
        meta: AttentionMetadata,
        logits_at: np.ndarray | None,
        sampling: SamplingArrays,
        with_margins: bool,
    ) -> tuple[Any, StepOutput]:
        arguments = _packed_arguments(tokens, meta, logits_at, sampling, with_margins)
        self._told.say("step", **arguments)
        pages, output = self._step.run(weights, pages, tokens, meta, logits_at, sampling, with_margins)
        self.num_traces, self._told.tokens = self._step.num_traces, output.tokens
        self._count += 1
        if self._count % STEPS_BETWEEN_CHECKS == 0:
            self._told.say("check")
            self._told.check_alike(f"step {self._count}")
        return pages, output


def follow(model: nnx.Module, backend: KVCacheManager, told: Told) -> dict[str, Any]:
    """On every process but 0: run what it runs until it is done; what it said then.

    Args:
        model: its weights on the mesh.
        backend: of which only the pages are used.
        told: of ``backend``.

    Raises:
        KVCacheError: process 0 gave up; its error, of the same class where it is one of this library's.
        ReplicaDriftError: this process and others were not told, or did not compute, the same.
    """
    assert backend.sharding is not None
    step, weights = split_model(model, backend.sharding.replicated)
    count = 0
    while True:
        kind, content = told.say("")
        if kind == "step":
            backend.pages, output = step.run(weights, backend.pages, *_unpacked_arguments(content))
            told.tokens, count = output.tokens, count + 1
        elif kind == "check":
            told.check_alike(f"step {count}")
        elif kind == "done":
            told.check_alike("the last step")
            return content
        elif kind == "failed":
            raise getattr(errors, content["error"], KVCacheError)(content["message"])
        else:
            ids = content["ids"]
            backend.pages = PAGE_MOVES[kind](backend.pages, *(ids[str(i)] for i in range(len(ids))))  # type: ignore[index]


def lead(told: Told, serve: Callable[[], _Result], pack: Callable[[_Result], dict[str, Any]]) -> _Result:
    """On process 0: ``serve``, and then tell the others that it is done, and what came of it, or what went wrong."""
    try:
        results = serve()
    except errors.ReplicaDriftError:
        raise  # on all processes at once
    except BaseException as error:
        told.say("failed", error=type(error).__name__, message=f"process 0: {error}")
        raise
    told.say("done", **pack(results))
    told.check_alike("the last step")
    return results


def check_same_call(told: Told, **arguments: Any) -> None:
    """Raise on every process unless all were called with the same arguments (anything with a ``repr`` that says all).

    Raises:
        InvalidArgumentError: they were not; it names the argument.
    """
    digests = {name: hashlib.sha256(repr(value).encode()).digest() for name, value in arguments.items()}
    try:
        told.check_alike("arguments", **{name: np.frombuffer(digest, np.uint8) for name, digest in digests.items()})
    except errors.ReplicaDriftError as error:
        raise InvalidArgumentError(f"got other arguments on other processes, want the same: {error}") from None


def _packed_arguments(
    tokens: np.ndarray,
    meta: AttentionMetadata,
    logits_at: np.ndarray | None,
    sampling: SamplingArrays,
    with_margins: bool,
) -> dict[str, Any]:
    fields = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
    static = {name: fields.pop(name) for name in ("max_query_len", "max_kv_len")}
    arrays = {"tokens": tokens, "logits_at": logits_at, **fields}
    return {
        "arrays": {name: np.asarray(array) for name, array in arrays.items() if array is not None},
        "sampling": {name: np.asarray(array) for name, array in sampling._asdict().items()},
        "static": static,
        "with_margins": bool(with_margins),
    }


def _unpacked_arguments(content: dict[str, Any]) -> tuple[Any, ...]:
    arrays = {"query_start_loc": None, "logits_at": None, **content["arrays"]}
    tokens, logits_at = arrays.pop("tokens"), arrays.pop("logits_at")
    meta = AttentionMetadata(**arrays, **content["static"])
    return tokens, meta, logits_at, SamplingArrays(**content["sampling"]), content["with_margins"]
