"""One model class for Llama, Qwen and Gemma 3, over any cache that offers ``attend``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata, LayerCache
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.layers import DecoderLayer, RMSNorm, RotaryTable
from pyagent_kv_jax.models.rope import rotary_table

Cache = TypeVar("Cache", bound=LayerCache)

_SEES_ALL = 2**30  # a window no sequence outgrows, for full layers between sliding ones


class Embedding(nnx.Module):
    """One row of ``hidden_size`` elements a token; times ``sqrt(hidden_size)`` if so configured.

    That factor is first rounded to the dtype of the weights, as Gemma was trained (sqrt(2560) is 50.5 in bfloat16).
    """

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else None
        init = nnx.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[T, hidden]. A token outside the vocabulary gives NaN: it shows, and stays in its own sequence."""
        weight = self.weight[...]
        rows = weight.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows if self.scale is None else rows * jnp.asarray(self.scale, weight.dtype)


class LlamaForCausalLM(nnx.Module):
    """A decoder, Llama's or one that ``config`` makes of it (Qwen2, Qwen3, Gemma 3).

    Its layers are one module with stacked parameters, [num_layers, ...] each.

    Works on a ragged batch: the tokens of all sequences stand one after another, and ``AttentionMetadata``
    says which is whose. The cache is carried through a scan over the layers, so that under donation it is
    written in place.

    Args:
        config: sizes and switches.
        dtype: of the parameters and of the matrix products; norms, rotations and logits are always float32.
        rngs: for random initial values.
    """

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = Embedding(config, dtype, rngs)
        self.layers = _stacked_layers(config, dtype, rngs)
        self.norm = RMSNorm(config.hidden_size, config, dtype)
        self.lm_head = None if config.tie_word_embeddings else self._output_projection(dtype, rngs)

    def __call__(
        self, tokens: jax.Array, cache: Cache, meta: AttentionMetadata, *, logits_at: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Logits for what follows each token, and the cache with the tokens in it.

        Args:
            tokens: i32[T]. An id outside the vocabulary gives NaN logits.
            cache: anything with ``LayerCache.attend``.
            meta: where the tokens stand; ``meta.positions`` i32[T] are their places in their sequences.
            logits_at: i32[S], indices into ``tokens`` of those whose logits are wanted (the last of each
                sequence, say); -1 is padding, and gives zeros. None: all.

        Returns:
            f32[S, vocab] (f32[T, vocab] without ``logits_at``), and the new cache.
        """
        x, cache = self._run_layers(self.embed_tokens(tokens), cache, meta)
        if logits_at is not None:
            x = x.at[logits_at].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return self._logits(self.norm(x)), cache

    def _run_layers(self, x: jax.Array, cache: Cache, meta: AttentionMetadata) -> tuple[jax.Array, Cache]:
        config = self.config
        rotary_of = self._rotary_by_layer(meta.positions)
        graph, stacked = nnx.split(self.layers)

        def run_layer(carry: tuple[jax.Array, Cache], inputs: Any) -> tuple[Any, None]:
            x, cache = carry
            params, layer, window = inputs
            return nnx.merge(graph, params)(x, cache, layer, rotary_of(layer), meta, window), None

        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(run_layer, (x, cache), (stacked, layers, self._windows()))
        return x, cache

    def _rotary_by_layer(self, positions: jax.Array) -> Callable[[jax.Array], RotaryTable]:
        """The rotary table of a traced layer; both kinds are made once a step, outside the layers."""
        config = self.config
        everywhere = rotary_table(positions, config.rope, config.head_dim)
        if config.local_rope is None or not config.layer_windows:
            return lambda layer: everywhere
        local = rotary_table(positions, config.local_rope, config.head_dim)
        is_local = jnp.array([window is not None for window in config.layer_windows])
        return lambda layer: jax.tree.map(partial(jnp.where, is_local[layer]), local, everywhere)

    def _windows(self) -> jax.Array | None:
        """i32[num_layers], or None where no layer has a window (kernels then skip that mask)."""
        if all(window is None for window in self.config.layer_windows):
            return None
        return jnp.array([w or _SEES_ALL for w in self.config.layer_windows], jnp.int32)

    def _output_projection(self, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(self.config.hidden_size, self.config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs)

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.lm_head is None:
            weight, x_axis, w_axis = self.embed_tokens.weight[...], 1, 1
        else:
            weight, x_axis, w_axis = self.lm_head.kernel[...], 1, 0
        contract = (((x_axis,), (w_axis,)), ((), ()))
        logits = jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
        cap = self.config.final_logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _stacked_layers(config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> DecoderLayer:
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(config, dtype, rngs)

    return create(rngs)
