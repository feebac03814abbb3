"""From logits to tokens: the parameters of one request, and one sampler for a whole batch of them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.errors import InvalidArgumentError

_MAX_SEED = 2**32 - 1
_NO_TOP_K = 2**31 - 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0 samples from ``softmax(logits / temperature)``.
        top_k: sample among the k most likely tokens only. None: all.
        top_p: of those, among the fewest most likely whose probabilities reach ``top_p``. 1: all.
        seed: token i of the request is a function of its logits, ``seed`` and i alone. None: drawn afresh per request.
        max_tokens: tokens to generate at most.
        stop_token_ids: generation stops after any of these.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
        n: answers to one prompt, which they share; the first is that of ``n = 1``, each has a seed of its own.

    Raises:
        InvalidArgumentError: a value outside the range given here.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        self._require("temperature", "a finite number >= 0", lambda v: _is_real(v) and v >= 0)
        self._require("top_k", "None or an integer >= 1", lambda v: v is None or (_is_integer(v) and v >= 1))
        self._require("top_p", "a number > 0 and <= 1", lambda v: _is_real(v) and 0 < v <= 1)
        self._require(
            "seed",
            f"None or 0 <= integer <= {_MAX_SEED}",
            lambda v: v is None or (_is_integer(v) and 0 <= v <= _MAX_SEED),
        )
        for name in ("max_tokens", "n"):
            self._require(name, "an integer >= 1", lambda v: _is_integer(v) and v >= 1)
        self._require(
            "stop_token_ids", "a sequence of integers >= 0", lambda v: not isinstance(v, str) and _are_token_ids(v)
        )
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))

    def _require(self, name: str, wanted: str, holds: Any) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise InvalidArgumentError(f"SamplingParams.{name}: got {value!r}, want {wanted}")


def _are_token_ids(values: Any) -> bool:
    try:
        return all(_is_integer(value) and value >= 0 for value in values)
    except TypeError:
        return False


GREEDY = SamplingParams()


def sample_seed(seed: int, index: int) -> int:
    """The seed u32 of answer ``index`` to a prompt: ``seed`` for the first, unrelated ones for the others."""
    return seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


class SamplingArrays(NamedTuple):
    """The parameters of S rows as arrays, so that any mix of them is one compiled call.

    Attributes:
        temperature: f32[S]; 0 is greedy.
        top_k: i32[S]; at least the vocabulary's size keeps all.
        top_p: f32[S].
        seed: u32[S].
        index: i32[S], how many tokens the row has generated before this one.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    index: Any

    @classmethod
    def from_rows(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], indices: Sequence[int], num_rows: int
    ) -> SamplingArrays:
        """Numpy arrays of ``num_rows`` rows; rows past ``params`` are greedy."""
        n = len(params)
        arrays = cls(
            np.zeros(num_rows, np.float32),
            np.full(num_rows, _NO_TOP_K, np.int32),
            np.ones(num_rows, np.float32),
            np.zeros(num_rows, np.uint32),
            np.zeros(num_rows, np.int32),
        )
        arrays.temperature[:n] = [row.temperature for row in params]
        if arrays.temperature.any():  # a greedy batch needs nothing else
            arrays.top_k[:n] = [min(row.top_k or _NO_TOP_K, _NO_TOP_K) for row in params]
            arrays.top_p[:n] = [row.top_p for row in params]
            arrays.seed[:n] = seeds
            arrays.index[:n] = indices
        return arrays


def sample(logits: jax.Array, rows: SamplingArrays) -> jax.Array:
    """Choose one token a row, under ``jit``.

    Sampling is the Gumbel-max trick: ``argmax(logits / temperature + noise)``, with noise drawn per token id from
    ``fold_in(key(seed), index)``. A row's token therefore never depends on the rows beside it, nor on which of the
    branches (greedy, no filter, sort and filter) the batch as a whole needs.

    Args:
        logits: f32[S, vocab].
        rows: the rows' parameters.

    Returns:
        i32[S]; -1 where a row's logits hold a NaN.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampled_rows = rows.temperature > 0
    drawn = jax.lax.cond(jnp.any(sampled_rows), _draw, lambda logits, rows: greedy, logits, rows)
    chosen = jnp.where(sampled_rows, drawn, greedy)
    return jnp.where(jnp.isnan(jnp.max(logits, axis=-1)), -1, chosen)


sample_jit = jax.jit(sample)


def top2_margin(logits: jax.Array) -> jax.Array:
    """How far the best logit is above the second best: f32[S, vocab] -> f32[S]."""
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    rest = jnp.where(jnp.arange(logits.shape[-1]) == best, -jnp.inf, logits)
    return jnp.max(logits, axis=-1) - jnp.max(rest, axis=-1)


def _scaled(logits: jax.Array, rows: SamplingArrays) -> jax.Array:
    """``logits / temperature``, shifted so that the best is 0 and a tiny temperature cannot overflow."""
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]


@partial(jax.vmap, in_axes=(0, 0, None))
def _gumbel(seed: jax.Array, index: jax.Array, vocab: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (vocab,), jnp.float32)


def _draw(logits: jax.Array, rows: SamplingArrays) -> jax.Array:
    vocab = logits.shape[-1]
    scaled, noise = _scaled(logits, rows), _gumbel(rows.seed, rows.index, vocab)
    is_filtered = (rows.temperature > 0) & ((rows.top_k < vocab) | (rows.top_p < 1))
    return jax.lax.cond(jnp.any(is_filtered), _best_of_kept, _best_of_all, scaled, noise, rows)


def _best_of_all(scaled: jax.Array, noise: jax.Array, rows: SamplingArrays) -> jax.Array:
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)


def _best_of_kept(scaled: jax.Array, noise: jax.Array, rows: SamplingArrays) -> jax.Array:
    """Sort, keep the top-k ranks, then the fewest of these that reach top-p, and take the best of what is left."""
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)  # among equals the lower id ranks first
    scaled, noise = (jnp.take_along_axis(x, order, axis=-1) for x in (scaled, noise))
    keep = jnp.arange(scaled.shape[-1]) < rows.top_k[:, None]
    probs = jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)
    reached_before = jnp.cumsum(probs, axis=-1) - probs
    # top_p = 1 must keep all, though the rounded sum may pass 1 before the end.
    keep &= (reached_before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    best = jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1, keepdims=True)
    return jnp.take_along_axis(order, best, axis=-1)[:, 0].astype(jnp.int32)
