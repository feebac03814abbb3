"""``generate``: many prompts in, many answers out, whatever their lengths."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages
from pyagent_kv_jax.errors import CallbackError, InvalidArgumentError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.manager.options import ManagerOptions
from pyagent_kv_jax.models.sharding import shard_model
from pyagent_kv_jax.serving.cache_backend import CacheBackend
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.request import FinishReason, Request, flat_tokens
from pyagent_kv_jax.serving.sampling import GREEDY, SamplingParams
from pyagent_kv_jax.serving.several_hosts import Told, ToldStep, check_same_call, follow, lead, spans_processes

TokenCallback = Callable[[int, int], Any]
_NO_MESH = Mesh(np.empty((), object), ())
_MAX_NUM_SEQS = 64
_STEPS_AHEAD = 16  # of decode, that blocks are reserved for; see benchmarks/prediction.py


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What became of one prompt.

    Attributes:
        token_ids: the tokens generated; a stop token, if one ended it, is the last.
        finish_reason: "stop" (a stop or end-of-sequence token) or "length" (``max_tokens``).
        num_preemptions: how often the request lost its blocks, and was computed again or brought back from the host.
        margins: best logit less second best for each token; None unless the engine was asked for margins.
        other_samples: the second to last answer, where ``SamplingParams.n`` asked for several; this is the first.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    num_preemptions: int
    margins: list[float] | None = None
    other_samples: tuple[GenerationResult, ...] = ()


def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    cache_config: KVCacheConfig | None = None,
    backend: CacheBackend | None = None,
    mesh: Mesh | CacheSharding | None = None,
    max_num_seqs: int | None = None,
    token_budget: int = 256,
    on_token: TokenCallback | None = None,
    progress: bool = False,
) -> list[GenerationResult]:
    """Generate from all prompts by continuous batching: rows that finish make room for prompts that wait.

    What a prompt has in common with an earlier one is computed once, as long as the cache has room to keep it; also
    over several calls, with one ``backend``.

    Args:
        model: a Flax NNX model called as ``model(tokens, cache, meta, logits_at=...)``. With a ``config.vocab_size``
            prompts are checked against it.
        prompts: token ids, one sequence a prompt.
        sampling: for all prompts, or one for each.
        cache_config: sizes of a paged cache made for this call, ``max_num_reqs`` at least ``max_num_seqs``. None: as
            the prompts need, for a model with ``config.kv_cache_config``.
        backend: a cache to serve through, instead of ``cache_config``; its other requests are left alone. Over several
            processes each has one of its own, used in calls that all of them make, and not by itself.
        mesh: devices to spread the weights and the cache over: K and V by head over axis "tp", by token over axis
            "dcp" (decode context parallel), weights over both. A ``CacheSharding`` where axes have other names, or for
            its choices. None: one device, or where ``backend`` is. Where the devices are of several processes
            (``jax.distributed``), all of them make the same call and get the same answers; process 0 decides what runs
            when, and alone calls ``on_token``.
        max_num_seqs: requests running at once. None: 64, or as many as the cache given has rows if those are fewer.
        token_budget: tokens computed in one step that does prefill; longer prompts are computed in chunks.
        on_token: ``on_token(index of answer, token id)`` after each token, in the order of generation. The answers to
            the first prompt come first, then those to the second, ...: with one answer each, it is the prompt's index.
        progress: show a bar on stderr.

    Returns:
        One result a prompt, in the order of the prompts; ``other_samples`` are in the first one.

    Raises:
        InvalidArgumentError: an empty prompt, a token outside the vocabulary, sizes that do not fit.
        ConfigError: a mesh that heads, blocks or axis names do not fit.
        RequestTooLongError: a prompt that with its ``max_tokens`` exceeds a row or the pool. Nothing was computed.
        CallbackError: ``on_token`` raised; generation stopped and every block was given back.
    """
    if backend is not None and (cache_config is not None or mesh is not None):
        raise InvalidArgumentError("got a backend and also cache_config or mesh, want the one or the others")
    prompts = list(prompts)
    for prompt in prompts:
        flat_tokens(prompt)
    params = one_each(sampling, len(prompts))
    if not prompts:
        return []
    if max_num_seqs is None:
        given = cache_config if backend is None else backend.config
        max_num_seqs = _MAX_NUM_SEQS if given is None else min(_MAX_NUM_SEQS, given.max_num_reqs)
    with _without_mesh():
        return _generate(
            model,
            prompts,
            params,
            cache_config,
            backend,
            mesh,
            EngineConfig(max_num_seqs, token_budget),
            on_token=on_token,
            progress=progress,
        )


def _generate(
    model: Any,
    prompts: Any,
    params: list[SamplingParams],
    cache_config: KVCacheConfig | None,
    backend: CacheBackend | None,
    mesh: Mesh | CacheSharding | None,
    sizes: EngineConfig,
    **options: Any,
) -> list[GenerationResult]:
    if backend is None:
        totals = [
            len(prompt) + each.max_tokens for prompt, each in zip(prompts, params, strict=True) for _ in range(each.n)
        ]
        sharding = None if mesh is None else CacheSharding.of(mesh)
        config = cache_config or fitting_cache_config(model, totals, max_num_seqs=sizes.max_num_seqs, sharding=sharding)
        backend = KVCacheManager(config, ManagerOptions(prediction_horizon=_STEPS_AHEAD), sharding=sharding)
    if backend.sharding is not None and spans_processes(backend.sharding.mesh):
        assert isinstance(backend, KVCacheManager)
        sizes = dataclasses.replace(sizes, tables_on_device=False)
        return _generate_on_hosts(model, backend, sizes, prompts, params, **options)
    return serve(Engine(model, backend, sizes), prompts, params, **options)


def serve(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    *,
    on_token: TokenCallback | None = None,
    progress: bool = False,
) -> list[GenerationResult]:
    """As ``generate``, through an engine that lives on (and stays warm) between calls."""
    params = one_each(sampling, len(prompts))
    requests = [engine.make_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    answers = [answer for request in requests for answer in (request, *request.samples)]
    index = {answer.request_id: i for i, answer in enumerate(answers)}
    margins: list[list[float]] = [[] for _ in answers]
    try:
        engine.add(requests)  # all were checked, so none is refused half way
        with tqdm(total=len(answers), unit="request", disable=not progress) as bar:
            while engine.has_unfinished:
                new_tokens, step_margins = engine.step()
                for request, token, row in new_tokens:
                    if step_margins is not None:
                        margins[index[request.request_id]].append(float(step_margins[row]))
                    _call(on_token, index[request.request_id], token)
                bar.update(sum(request.finish_reason is not None for request, _, _ in new_tokens))
    finally:
        engine.abort_all()  # after success too: the last finished requests still hold their blocks

    def result(request: Request) -> GenerationResult:
        assert request.finish_reason is not None
        return GenerationResult(
            request.output,
            request.finish_reason,
            request.num_preemptions,
            margins[index[request.request_id]] if engine.config.with_margins else None,
            tuple(result(sample) for sample in request.samples),
        )

    return [result(request) for request in requests]


def one_each(sampling: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """``sampling`` for each of ``count`` prompts.

    Raises:
        InvalidArgumentError: a sequence of another length, or of something else.
    """
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    params = list(sampling) if isinstance(sampling, Iterable) else [sampling]
    if len(params) != count or not all(isinstance(each, SamplingParams) for each in params):
        got = f"{len(params)} entries, of {sorted({type(each).__name__ for each in params})}"
        raise InvalidArgumentError(f"sampling: got {got}, want one SamplingParams, or one for each of {count} prompts")
    return params


def fitting_cache_config(
    model: Any, lengths: Sequence[int], *, max_num_seqs: int, sharding: CacheSharding | None = None, **overrides: Any
) -> KVCacheConfig:
    """A cache for ``model`` with about as many blocks as these requests can fill, or as many as memory holds.

    Args:
        model: its ``config.kv_cache_config`` tells the layers and heads.
        lengths: tokens of each request, prompt and answer.
        max_num_seqs: requests that run at once.
        sharding: of a cache on a mesh, whose blocks have 16 tokens on each context rank unless ``block_size`` is given.
        **overrides: fields of ``KVCacheConfig`` that are given.

    Raises:
        InvalidArgumentError: a ``model`` that does not tell.
        ConfigError: as ``KVCacheConfig``.
    """
    if not hasattr(getattr(model, "config", None), "kv_cache_config"):
        raise InvalidArgumentError(
            f"model: got {type(model).__name__} without config.kv_cache_config, want a cache_config with the sizes of "
            f"its cache: KVCacheConfig(num_layers=..., num_heads=..., head_dim=..., num_blocks=...)"
        )
    sizes = {"max_num_reqs": max_num_seqs, **overrides}
    if sharding is not None:
        sizes = {"block_size": 16 * sharding.context_size, **sizes}
    if sizes.get("num_blocks") is None:
        config: KVCacheConfig = model.config.kv_cache_config(**{**sizes, "num_blocks": None})
        most = config.pool_blocks if sharding is None else sharding.fitting_blocks(config)
        longest = np.sort(np.asarray(lengths))[::-1][:max_num_seqs]
        wanted = int(np.sum(-(-longest // config.block_size)))
        spare = max_num_seqs + wanted // 16  # so that the watermark holds nobody up
        # A power of two, so that calls with other prompts find the same shapes compiled.
        sizes["num_blocks"] = min(1 << (wanted + spare - 1).bit_length(), most)
    return model.config.kv_cache_config(**sizes)


def _generate_on_hosts(
    model: nnx.Module, backend: KVCacheManager, sizes: EngineConfig, prompts: Any, params: Any, **options: Any
) -> list[GenerationResult]:
    """``serve`` on a mesh of several processes, each of which makes this call."""
    told = Told.of(backend)
    tokens = [list(prompt) for prompt in prompts]  # of an array, repr leaves out the middle
    check_same_call(told, prompts=tokens, sampling=params, cache=backend.config, sizes=sizes)
    assert backend.sharding is not None
    model = shard_model(model, backend.sharding)  # what is wrong with weights or pages is raised on all processes,
    assert isinstance(backend.pages, ShardedKVPages)  # before any of them waits for another
    if not told.is_source:
        return [_unpacked(answer) for answer in json.loads(follow(model, backend, told)["answers"])]
    backend.before_page_moves(lambda move, ids: told.say(move, ids={str(i): each for i, each in enumerate(ids)}))

    def served() -> list[GenerationResult]:
        engine = Engine(model, backend, sizes, wrap_step=lambda step: ToldStep(step, told))
        return serve(engine, prompts, params, **options)

    return lead(
        told, served, lambda results: {"answers": json.dumps([dataclasses.asdict(result) for result in results])}
    )


def _without_mesh() -> contextlib.AbstractContextManager[Any]:
    """A mesh that the caller has set is not for the programs of the host; where none is, they are not traced anew."""
    return contextlib.nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(_NO_MESH)


def _unpacked(answer: dict[str, Any]) -> GenerationResult:
    return GenerationResult(**{**answer, "other_samples": tuple(_unpacked(other) for other in answer["other_samples"])})


def _call(on_token: TokenCallback | None, index: int, token: int) -> None:
    if on_token is None:
        return
    try:
        on_token(index, token)
    except Exception as cause:
        raise CallbackError(f"on_token({index}, {token}) raised {cause!r}; generation stopped") from cause
