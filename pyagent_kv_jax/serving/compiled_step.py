"""The one function that runs on the accelerator: model, cache and sampler in a single jitted step."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from flax import nnx

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.serving.sampling import SamplingArrays, sample, top2_margin


class StepOutput(NamedTuple):
    """What a step sends back to the host.

    Attributes:
        tokens: i32[R], the token each row chose; of use where the row's prompt is complete.
        margins: f32[R], how clear the choice was (best logit less second best); None unless asked for.
    """

    tokens: Any
    margins: Any


@dataclasses.dataclass
class CompiledStep:
    """The jitted step of one model; engines over the same model share it, and with it what is compiled.

    Call ``run(weights, pages, tokens i32[T], meta, logits_at i32[R] | None, sampling, with_margins)``; ``pages`` is
    donated. It returns ``(pages, StepOutput)``.

    Attributes:
        run: the jitted function.
        num_traces: how often it was traced, i.e. compiled.
    """

    run: Any
    num_traces: int = 0


def split_model(
    model: nnx.Module, replicated: jax.sharding.NamedSharding | None = None
) -> tuple[CompiledStep, tuple[jax.Array, ...]]:
    """The step of ``model`` and its weights as a flat tuple, which dispatches faster than an nnx state.

    ``replicated``: for a model on a mesh, where every device is to have what the step sends back.

    A model with a static attribute that cannot be hashed (a dataclass that may change) gets a step of its own each
    time, which compiles anew: keep the engine.
    """
    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    shared_or_new = _compiled_step if _is_hashable(graph) else _compiled_step.__wrapped__
    return shared_or_new(graph, structure, replicated), tuple(weights)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _tables_of_rows(meta: AttentionMetadata) -> jax.Array:
    """The tables of the batch's rows, of more rows than it has, the groups' one after another (``TablesOnDevice``)."""
    tables, num_rows = meta.block_tables, meta.kv_lens.shape[0]
    if meta.slot_mapping.ndim == 2:
        tables = tables.reshape(meta.slot_mapping.shape[0], -1, tables.shape[-1])
    return tables[..., :num_rows, :]


@lru_cache(maxsize=8)
def _compiled_step(graph: Any, structure: Any, replicated: jax.sharding.NamedSharding | None) -> CompiledStep:
    def step(
        weights: tuple[jax.Array, ...],
        pages: Any,
        tokens: jax.Array,
        meta: AttentionMetadata,
        logits_at: jax.Array | None,
        sampling: SamplingArrays,
        with_margins: bool,
    ) -> tuple[Any, StepOutput]:
        compiled.num_traces += 1  # runs only while tracing
        model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
        meta = dataclasses.replace(meta, block_tables=_tables_of_rows(meta))
        logits, pages = model(tokens, pages, meta, logits_at=logits_at)
        if replicated is not None:  # gathered once, and not in pieces by each search and sort
            logits = jax.lax.with_sharding_constraint(logits, replicated)
        output = StepOutput(sample(logits, sampling), top2_margin(logits) if with_margins else None)
        return pages, output if replicated is None else jax.lax.with_sharding_constraint(output, replicated)

    compiled = CompiledStep(jax.jit(step, donate_argnums=1, static_argnums=6))
    return compiled
