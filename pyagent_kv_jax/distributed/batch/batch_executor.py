"""Plan a batch once, run it on every layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import is_count, static_count
from pyagent_kv_jax.distributed.batch.batch_metadata import BatchMetadata
from pyagent_kv_jax.distributed.batch.batch_request import BatchPhase, BatchRequest
from pyagent_kv_jax.distributed.batch.batch_stats import BatchStats
from pyagent_kv_jax.distributed.batch.communication import received_bytes
from pyagent_kv_jax.distributed.batch.execution_plan import ExecutionPlan, make_plan
from pyagent_kv_jax.distributed.batch.placement import placed
from pyagent_kv_jax.distributed.batch.plan_config import DCPPlanConfig
from pyagent_kv_jax.distributed.batch.planned_attention import BatchOutput, compiled_attention
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, ShapeMismatchError

_TRACED_OPTIONS = ("sliding_window", "chunk_size")  # integers that vary by layer
_STATIC_OPTIONS = ("scale", "logits_soft_cap")


class BatchExecutor(ABC):
    """What can plan batches of requests and run the plans."""

    @abstractmethod
    def plan(self, requests: Sequence[BatchRequest]) -> ExecutionPlan:
        """A plan for one batch, good for all layers. Everything that can be refused is refused here."""

    @abstractmethod
    def run(
        self,
        plan: ExecutionPlan,
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """The plan on one layer, in one compiled call."""


class MeshBatchExecutor(BatchExecutor):
    """Batches of any phase over a cache on a mesh.

    In a program of several processes each makes the same plans and runs them in the same order.
    """

    phase: ClassVar[BatchPhase] = BatchPhase.MIXED
    _skip_context: ClassVar[bool] = True

    def __init__(self, config: DCPPlanConfig) -> None:
        self.config = config
        self._programs = compiled_attention(config)
        self._places = config.q_sharding, config.kv_sharding  # worked out once: a layer's call is to be quick
        self._received: dict[tuple[int, bool], int] = {}
        self._stats = BatchStats()

    def plan(self, requests: Sequence[BatchRequest]) -> ExecutionPlan:
        """A plan for one batch, request i in row i, made on the host; see ``make_plan``.

        Raises:
            InvalidArgumentError: no requests, blocks missing for a request's tokens, a request of another phase than
                the executor's, more tokens or bytes than the config allows.
            DuplicateRequestError: one id twice.
            RequestTooLongError: more tokens than the cache allows a request.
            InvalidBlockError: a block outside the pool, or one that one request writes and another one holds too.
            TooManyRequestsError: more requests than the config allows.
        """
        for request in requests:
            if self.phase is not BatchPhase.MIXED and request.phase not in (None, self.phase):
                raise InvalidArgumentError(
                    f"request {request.request_id!r}: got phase {request.phase!s}, want {self.phase!s}"
                )
        return self._plan(BatchMetadata.from_requests(requests, self.config.cache))

    def run(
        self,
        plan: ExecutionPlan,
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """Write the batch's K and V of ``layer``, attend causally over all its requests hold; one compiled call.

        Args:
            plan: of this config.
            pages: of this config's cache and sharding. Donated: use those of the result from then on.
            layer: of the model.
            q: [plan.num_tokens, q_heads, head_dim] of the config's dtype: tokens of the requests one after another,
                then padding, whatever it holds. Best spread as ``DCPPlanConfig.q_sharding``.
            k: [plan.num_tokens, num_heads, head_dim]; best spread as ``kv_sharding``.
            v: [plan.num_tokens, num_heads, v_head_dim].
            **options: ``scale``, ``sliding_window``, ``chunk_size``, ``logits_soft_cap`` and ``sinks`` as for
                ``KVPages.attend``. Another scale or cap is another program.

        Raises:
            ShapeMismatchError: q, k or v of other shapes or dtype than the plan's.
            ConfigError: a plan or pages of another config.
            InvalidArgumentError: no such layer or option, or pages that another call was given. Nothing has changed.
        """
        self._check_plan(plan, pages, layer)
        self._check_arrays({"q": q, "k": k, "v": v}, plan.num_tokens, exact=True)
        arrays, static = self._split_options(options)
        q_place, kv_place = self._places
        q, k, v = placed(q, q_place), placed(k, kv_place), placed(v, kv_place)
        before = self._programs.num_traces
        output = self._programs.run(
            pages, np.int32(layer), q, k, v, plan.meta, plan.own_tokens, arrays, tuple(static.items())
        )
        self._stats.num_runs += 1
        self._stats.num_compilations += self._programs.num_traces - before
        self._stats.num_layer_tokens += plan.batch.num_tokens
        self._stats.bytes_exchanged += self._bytes_received(plan)
        return output

    def process_batch(
        self,
        requests: Sequence[BatchRequest],
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """``plan``, then ``run`` of arrays that are not padded: a step of one layer in one line.

        Of a model of many layers, plan once and use ``run_ragged`` on each.

        Arguments and errors as theirs, but for q, k and v: [N, ...] with N no less than the batch's tokens. The result
        is [N, ...] too; past the batch's tokens, 0 and -inf. With N the same from call to call nothing is compiled
        anew.
        """
        return self.run_ragged((self.plan(requests),), pages, layer, q, k, v, **options)

    def run_ragged(
        self,
        plans: Sequence[ExecutionPlan],
        pages: ShardedKVPages,
        layer: int,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        **options: Any,
    ) -> BatchOutput:
        """``run`` of each of ``plans``, whose tokens stand one after another in q, k and v; as ``process_batch``."""
        tokens = sum(plan.batch.num_tokens for plan in plans)
        self._check_arrays({"q": q, "k": k, "v": v}, tokens, exact=False)
        self._split_options(options)
        for plan in plans:
            self._check_plan(plan, pages, layer)
        count = np.shape(q)[0]
        out, lse = self._empty_output(count)
        start = 0
        for plan in plans:
            parts = self._programs.cut(q, k, v, np.int32(start), size=plan.num_tokens)
            part, part_lse, pages = self.run(plan, pages, layer, *parts, **options)
            out, lse = self._programs.put(out, lse, part, part_lse, np.int32(start))
            start += plan.batch.num_tokens
        return BatchOutput(out, lse, pages)

    def get_stats(self) -> BatchStats:
        """A copy of the counts so far."""
        return dataclasses.replace(self._stats)

    # -- inside --------------------------------------------------------------------------------------------------

    def _plan(self, batch: BatchMetadata) -> ExecutionPlan:
        plan = make_plan(self.config, batch, skip_context=self._skip_context)
        self._stats.num_plans += 1
        self._stats.num_tokens += batch.num_tokens
        self._stats.num_padded_tokens += plan.num_tokens - batch.num_tokens
        return plan

    def _bytes_received(self, plan: ExecutionPlan) -> int:
        shape = (plan.num_tokens, plan.has_context)
        if shape not in self._received:
            self._received[shape] = received_bytes(self.config, plan.num_tokens, has_context=plan.has_context)
        return self._received[shape]

    def _empty_output(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        config = self.config
        shape, place = (num_tokens, config.num_q_heads), config.q_sharding
        out = jnp.zeros((*shape, config.cache.value_head_dim), config.activation_dtype.jax_dtype, device=place)
        return out, jnp.full(shape, -jnp.inf, jnp.float32, device=place)

    def _check_own(self, plan: ExecutionPlan) -> None:
        if plan.config is not self.config and plan.config != self.config:
            raise ConfigError(f"plan: got one of {plan.config}, want one of this executor's {self.config}")

    def _check_plan(self, plan: ExecutionPlan, pages: ShardedKVPages, layer: int) -> None:
        self._check_own(plan)
        if not isinstance(pages, ShardedKVPages):
            raise ConfigError(f"pages: got {type(pages).__name__}, want ShardedKVPages")
        for name, got, want in (
            ("config", pages.config, self.config.cache),
            ("sharding", pages.sharding, self.config.sharding),
        ):
            if got is not want and got != want:
                raise ConfigError(f"pages: got {name} {got}, want {want}")
        if pages.k_pages.is_deleted():  # XLA would take the process down
            raise InvalidArgumentError("pages: got some that another call was given, want those of its result")
        if not is_count(layer) or layer >= self.config.cache.num_layers:
            raise InvalidArgumentError(f"layer: got {layer!r}, want an integer below {self.config.cache.num_layers}")

    def _check_arrays(self, arrays: dict[str, Any], num_tokens: int, *, exact: bool) -> None:
        cache, dtype = self.config.cache, self.config.activation_dtype.jax_dtype
        widths = {
            "q": (self.config.num_q_heads, cache.head_dim),
            "k": (cache.num_heads, cache.head_dim),
            "v": (cache.num_heads, cache.value_head_dim),
        }
        count = np.shape(arrays["q"])[:1]
        for name, array in arrays.items():
            shape = tuple(np.shape(array))
            fits = (
                shape[:1] == (num_tokens,) if exact else shape[:1] == count and bool(count) and count[0] >= num_tokens
            )
            got = getattr(array, "dtype", type(array).__name__)
            if not fits or shape[1:] != widths[name] or got != dtype:
                at_least = "" if exact else "at least "
                raise ShapeMismatchError(
                    f"{name}: got {got}{list(shape)}, want {dtype}[{at_least}{num_tokens}, "
                    f"{widths[name][0]}, {widths[name][1]}]{'' if exact else ', as many as q'}"
                )

    def _split_options(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of attention that are arrays, and those that are part of the program; None is left out."""
        given = {name: value for name, value in options.items() if value is not None}
        known = (*_TRACED_OPTIONS, *_STATIC_OPTIONS, "sinks")
        if unknown := sorted(set(given) - set(known)):
            raise InvalidArgumentError(f"options: got {unknown}, want some of {sorted(known)}")
        arrays: dict[str, Any] = {
            name: np.int32(static_count(name, given[name], 1)) for name in _TRACED_OPTIONS if name in given
        }
        if (sinks := given.get("sinks")) is not None:
            if np.shape(sinks) != (self.config.num_q_heads,):
                raise ShapeMismatchError(f"sinks: got shape {np.shape(sinks)}, want ({self.config.num_q_heads},)")
            arrays["sinks"] = sinks if isinstance(sinks, jax.Array) else np.asarray(sinks, np.float32)
        return arrays, {name: float(given[name]) for name in _STATIC_OPTIONS if name in given}
