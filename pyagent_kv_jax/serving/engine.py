"""The engine: asks the scheduler, the cache manager and the compiled step in turn, one step at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import DeviceType
from pyagent_kv_jax.errors import InvalidArgumentError, KVCacheError, UnknownRequestError
from pyagent_kv_jax.manager.step_plan import StepPlan
from pyagent_kv_jax.models.sharding import shard_model
from pyagent_kv_jax.serving.cache_backend import CacheBackend
from pyagent_kv_jax.serving.compiled_step import CompiledStep, StepOutput, split_model
from pyagent_kv_jax.serving.request import Request, flat_tokens
from pyagent_kv_jax.serving.sampling import SamplingArrays, SamplingParams, sample_seed
from pyagent_kv_jax.serving.scheduler import NewToken, Outcome, Schedule, Scheduler, SchedulerConfig
from pyagent_kv_jax.serving.tables_on_device import TablesOnDevice

_engine_numbers = itertools.count()  # so that engines sharing a manager never use the same request id


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of a step; together with the cache's they fix every compiled shape.

    Attributes:
        max_num_seqs: requests running at once.
        token_budget: tokens computed in a step that does any prefill.
        row_buckets: batch sizes a pure decode step is padded to. None: 4, 8, 16, ... ``max_num_seqs``.
        token_buckets: token counts a step with prefill is padded to. None: a quarter of ``token_budget``
            (if that is at least 32), and all.
        watermark: share of the pool kept free for running requests when a waiting one is admitted.
        with_margins: also return how clear each choice of a token was.
        tables_on_device: keep the block tables on the device and send the rows that changed, instead of all with each
            step. None: where the cache is on an accelerator.
    """

    max_num_seqs: int = 64
    token_budget: int = 256
    row_buckets: tuple[int, ...] | None = None
    token_buckets: tuple[int, ...] | None = None
    watermark: float = 0.01
    with_margins: bool = False
    tables_on_device: bool | None = None

    def decode_sizes(self) -> tuple[int, ...]:
        """``row_buckets``, resolved: ascending, the last one ``max_num_seqs``."""
        chosen = self.row_buckets or [4 * 2**i for i in range(self.max_num_seqs.bit_length())]
        return _ascending_to(self.max_num_seqs, chosen)

    def prefill_sizes(self) -> tuple[int, ...]:
        """``token_buckets``, resolved: ascending, the last one ``token_budget``."""
        return _ascending_to(
            self.token_budget, self.token_buckets or [size for size in [self.token_budget // 4] if size >= 32]
        )


def _ascending_to(largest: int, sizes: Iterable[int]) -> tuple[int, ...]:
    return (*sorted(size for size in set(sizes) if 0 < size < largest), largest)


class Engine:
    """Serves requests through one model and one cache.

    A step frees and allocates in one call of the manager, runs the model in one jitted call, and reads one small array
    back. Shapes come from a fixed set, so that after ``warm_up`` nothing compiles but the first forks and swaps.

    The manager enters blocks into its prefix cache when it plans the step that fills them. Later steps come after it on
    the device, so what they find there is written; but after a step that broke off it may not be: see ``abort_all``.

    Args:
        model: called as ``model(tokens, pages, meta, logits_at=...)``; its ``config``, if it has one, tells
            ``vocab_size`` and ``eos_token_ids``.
        backend: the cache. If it is on a mesh, so are the weights: see ``shard_model``.
        config: sizes.
        wrap_step: what runs in place of the compiled step, given it.

    Raises:
        ConfigError: query heads that the mesh's axes do not divide.
        InvalidArgumentError: sizes that do not fit each other.
    """

    def __init__(
        self,
        model: nnx.Module,
        backend: CacheBackend,
        config: EngineConfig = EngineConfig(),
        *,
        wrap_step: Callable[[CompiledStep], CompiledStep] = lambda step: step,
    ) -> None:
        self.backend = backend
        self.config = config
        sizes = self._sizes = backend.config
        self.scheduler = Scheduler(self._scheduler_config())
        if backend.config.max_num_reqs < config.max_num_seqs:
            raise InvalidArgumentError(
                f"max_num_seqs: got {config.max_num_seqs}, want at most the cache's max_num_reqs = "
                f"{backend.config.max_num_reqs}"
            )
        self.num_compilations = 0
        self.on_step: Callable[[Schedule, StepPlan, Outcome], None] | None = None
        sharding = backend.sharding
        replicated = None if sharding is None else sharding.replicated
        step, self._weights = split_model(model if sharding is None else shard_model(model, sharding), replicated)
        self._step = wrap_step(step)
        self._vocab_size: int | None = getattr(getattr(model, "config", None), "vocab_size", None)
        self._eos = frozenset(getattr(getattr(model, "config", None), "eos_token_ids", ()))
        self._decode_sizes, self._prefill_sizes = config.decode_sizes(), config.prefill_sizes()
        self._name = f"engine{next(_engine_numbers)}"
        self._request_numbers = itertools.count()
        on_device = config.tables_on_device
        if on_device is None:
            on_device = sizes.device_type is not DeviceType.CPU
        self.tables = TablesOnDevice(replicated) if on_device else None
        self._broke_off = False  # blocks of a step may be in the prefix cache that the model has not written
        self._scales: dict[str, jax.Array] = {}  # copies of the pages', which a step that breaks off may take along
        self._last_scale: jax.Array | None = None

    def _scheduler_config(self) -> SchedulerConfig:
        sizes, config = self._sizes, self.config
        return SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            token_budget=config.token_budget,
            block_size=sizes.block_size,
            num_blocks=sizes.pool_blocks,
            max_model_len=sizes.max_model_len,
            watermark_blocks=int(config.watermark * sizes.pool_blocks),
            num_groups=len(sizes.groups),
            most_blocks=lambda num_tokens: sizes.most_blocks(num_tokens, config.token_budget),
            can_fork=self.backend.can_fork,
        )

    # -- requests ----------------------------------------------------------------------------------------------

    def make_request(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        """Check a request without queueing it.

        Raises:
            InvalidArgumentError: an empty prompt, or a token that is no integer of the vocabulary.
            RequestTooLongError: it could never fit.
        """
        tokens = self._checked_tokens(prompt)
        self.scheduler.validate(len(tokens), sampling.max_tokens)
        seed = secrets.randbits(32) if sampling.seed is None else int(sampling.seed)
        stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos)
        name = f"{self._name}-{next(self._request_numbers)}"
        first, *others = [
            Request(name if i == 0 else f"{name}.{i}", tokens, sampling, sample_seed(seed, i), stops)
            for i in range(sampling.n)
        ]
        first.samples = tuple(others)
        return first

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests made by ``make_request``, in order."""
        for request in requests:
            self._introduce(self.scheduler.add(request))

    def _introduce(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.backend.add_request(request.request_id, request.prompt)

    def _checked_tokens(self, prompt: Sequence[int]) -> np.ndarray:
        tokens = flat_tokens(prompt)
        limit = np.iinfo(np.int32).max if self._vocab_size is None else self._vocab_size
        wrong = tokens[(tokens < 0) | (tokens >= limit)]
        if wrong.size:
            raise InvalidArgumentError(f"prompt: got token id {wrong[0]}, want 0 to {limit - 1}")
        return tokens.astype(np.int32)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still wants tokens."""
        return self.scheduler.has_unfinished

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self) -> tuple[list[NewToken], np.ndarray | None]:
        """Serve one step.

        Returns:
            The new tokens, and the margins f32[rows] of the step's rows if the engine was asked for them.

        Raises:
            OutOfBlocksError: the cache's blocks are held by others, and nothing can go on.
            CallbackError: a memory-pressure callback of the cache raised; the step itself is complete.
            KVCacheError: the model gave NaN for a token.
        """
        if self.backend.config is not self._sizes:  # the cache has changed its block size
            self._sizes = self.backend.config
            self.scheduler.config = self._scheduler_config()
        schedule = self.scheduler.schedule(self.backend.get_num_free_blocks, self.backend.preview)
        self._broke_off = True
        plan = self._plan(schedule)
        tokens, margins = self._run(schedule, plan) if plan.ok.any() else ([0] * len(plan.ok), None)
        for request, served, token in zip(schedule.requests, plan.ok, tokens, strict=False):
            if served and token < 0:
                raise KVCacheError(
                    f"request {request.request_id!r}: got NaN logits for token {len(request.output)}, want numbers"
                )
        self._broke_off = False
        outcome = self.scheduler.update(
            schedule, plan.ok.tolist(), plan.num_tokens.tolist(), plan.num_cached_tokens.tolist(), tokens
        )
        self._carry_out(outcome)
        if self.on_step is not None:
            self.on_step(schedule, plan, outcome)
        for error in plan.callback_errors:
            raise error
        return outcome.new_tokens, margins

    def _carry_out(self, outcome: Outcome) -> None:
        """Tell the cache what follows from a step."""
        going_on = [new for new in outcome.new_tokens if new.request.finish_reason is None]
        if going_on:
            self.backend.record_tokens(
                [new.request.request_id for new in going_on], np.array([new.token for new in going_on], np.int32)
            )
        for parent, child in outcome.forks:
            self.backend.fork(parent.request_id, child.request_id)
        self._introduce(outcome.queued)
        if outcome.preempted:
            done = self.backend.preempt([request.request_id for request in outcome.preempted])
            self.scheduler.stats.num_swapped += sum(way == "swap" for way in done.values())

    def _plan(self, schedule: Schedule) -> StepPlan:
        """The manager's answer. It sees two shapes only, decode and prefill at their largest."""
        return self.backend.step(
            [request.request_id for request in schedule.requests],
            schedule.num_new_tokens,
            free=schedule.free,
            num_rows=self.config.max_num_seqs,
            num_tokens=self.config.token_budget if max(schedule.num_new_tokens, default=1) > 1 else None,
        )

    def _run(self, schedule: Schedule, plan: StepPlan) -> tuple[list[int], np.ndarray | None]:
        """Run the model over the granted tokens and read the chosen ones back: the step's only wait for the device."""
        counts, cached = plan.num_tokens.tolist(), plan.num_cached_tokens.tolist()
        chunks = [r.next_tokens(skip, n) for r, skip, n in zip(schedule.requests, cached, counts, strict=True)]
        total = sum(counts)
        if plan.metadata.query_start_loc is None:  # token i belongs to row i, granted or not
            num_rows, num_tokens = _smallest(self._decode_sizes, len(chunks)), None
            at = np.flatnonzero(plan.num_tokens)
        else:
            num_rows, num_tokens = self.config.max_num_seqs, _smallest(self._prefill_sizes, total)
            at = np.arange(total)
        tokens = np.zeros(num_rows if num_tokens is None else num_tokens, np.int32)
        tokens[at] = np.concatenate(chunks)
        sampling = SamplingArrays.from_rows(
            [request.sampling for request in schedule.requests],
            [request.seed for request in schedule.requests],
            [len(request.output) for request in schedule.requests],
            num_rows,
        )
        chosen, margins = jax.device_get(self._dispatch(tokens, plan.metadata, sampling))
        return chosen.tolist(), margins

    def _dispatch(self, tokens: np.ndarray, meta: AttentionMetadata, sampling: SamplingArrays) -> StepOutput:
        # Hints that depend on the shape alone, for they are static.
        tables = None if self.tables is None else self.tables.send(np.asarray(meta.block_tables))
        meta = meta.cut(num_rows=len(sampling.seed), num_tokens=len(tokens))
        meta = dataclasses.replace(
            meta,
            max_kv_len=self.backend.config.max_model_len,
            block_tables=meta.block_tables if tables is None else tables,  # cut in the step
        )
        logits_at = None if meta.query_start_loc is None else np.asarray(meta.query_start_loc[1:] - 1, np.int32)
        before, pages = self._step.num_traces, self.backend.pages
        self._keep_scales(pages)
        pages, output = self._step.run(
            self._weights, pages, tokens, meta, logits_at, sampling, self.config.with_margins
        )
        self.backend.pages, self._last_scale = pages, getattr(pages, "k_scale", None)
        self.num_compilations += self._step.num_traces - before
        return output

    def _keep_scales(self, pages: Any) -> None:
        """Copy the scales of quantised pages, unless they came out of this engine's last step."""
        scale = getattr(pages, "k_scale", None)
        if scale is not None and scale is not self._last_scale:
            self._scales = {name: jnp.copy(getattr(pages, name)) for name in ("k_scale", "v_scale")}

    # -- before and after --------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile every shape a step can have, the manager's part included, without touching what the cache holds."""
        rows, budget = self.config.max_num_seqs, self.config.token_budget
        self.backend.warm_up(rows)
        self.backend.warm_up(rows, budget)
        for _ in range(2):  # jax may compile once more for pages that come out of a step than for new ones
            self._warm_up((size, size) for size in self._decode_sizes)
            self._warm_up(((rows, size) for size in self._prefill_sizes), budget)

    def _warm_up(self, shapes: Iterable[tuple[int, int]], num_tokens: int | None = None) -> None:
        """Run the (rows, tokens) of one layout, decode unless ``num_tokens`` is given, for nobody."""
        nobody = self.backend.step([], [], num_rows=self.config.max_num_seqs, num_tokens=num_tokens).metadata
        if self.tables is not None:
            self.tables.warm_up(np.asarray(nobody.block_tables))
        for row_size, token_size in shapes:
            sampling = SamplingArrays.from_rows([], [], [], row_size)
            jax.block_until_ready(self._dispatch(np.zeros(token_size, np.int32), nobody, sampling))

    def abort(self, request: Request) -> None:
        """Forget one request between two steps, and its other samples; their blocks come back at once.

        One that is not here, or has finished, is passed over: the next step gives back what a finished one held.
        """
        for request_id in self.scheduler.drop(request):
            with contextlib.suppress(UnknownRequestError):  # a sample that has not been introduced
                self.backend.free(request_id)

    def abort_all(self) -> None:
        """Forget every request and give all their blocks back; safe after an error or interrupt anywhere in a step.

        If a step broke off before its results came, the prefix cache is reset: it may name blocks that were never
        written, or hold NaN.
        """
        for request_id in self.scheduler.drop_all():
            with contextlib.suppress(UnknownRequestError):  # the step that broke off had freed it, or it never came
                self.backend.free(request_id)
        if self._broke_off:
            self.backend.reset_prefix_cache()
            self._broke_off = False
        pages = self.backend.pages
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(pages)):  # it broke off after the pages were donated
            empty = jax.tree.map(_zeros_in_place_of, pages)
            self.backend.pages = dataclasses.replace(empty, **self._scales) if self._scales else empty


def _zeros_in_place_of(lost: jax.Array) -> jax.Array:
    # Committed or not as before: that is part of what a compiled step is chosen by.
    return jnp.zeros(lost.shape, lost.dtype, device=lost.sharding if lost.committed else None)


def _smallest(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)
