"""The parts of a decoder layer, Llama's or Gemma's. ``T`` is the tokens of a ragged batch, one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata, LayerCache
from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.rope import rotate

RotaryTable = tuple[jax.Array, jax.Array]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": partial(nnx.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """Divide the last axis by its root mean square, in float32; then a weight for each element.

    Llama rounds to the dtype of ``x`` before the weight. Gemma multiplies by one plus the weight and rounds after.
    """

    def __init__(self, size: int, config: LlamaConfig, dtype: Any) -> None:
        self.eps, self.plus_one = config.rms_norm_eps, config.norm_plus_one
        self.weight = nnx.Param((jnp.zeros if self.plus_one else jnp.ones)((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (wide * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * self.weight[...]


def _linear(in_size: int, out_size: int, use_bias: bool, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_size, out_size, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention; what was said before, and how it is stored, is the cache's business."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.head_dim, self.scale, self.soft_cap = config.head_dim, config.attention_scale, config.attn_logit_soft_cap
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config.hidden_size, q_size, config.qkv_bias, dtype, rngs)
        self.k_proj = _linear(config.hidden_size, kv_size, config.qkv_bias, dtype, rngs)
        self.v_proj = _linear(config.hidden_size, kv_size, config.qkv_bias, dtype, rngs)
        self.o_proj = _linear(q_size, config.hidden_size, config.o_bias, dtype, rngs)
        self.q_norm = RMSNorm(config.head_dim, config, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, dtype) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache,
        layer: jax.Array,
        rotary: RotaryTable,
        meta: AttentionMetadata,
        sliding_window: Any,
    ) -> tuple[jax.Array, LayerCache]:
        heads = (x.shape[0], -1, self.head_dim)
        q = self.q_proj(x).reshape(heads)
        k = self.k_proj(x).reshape(heads)
        v = self.v_proj(x).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        out, cache = cache.attend(
            layer, q, k, v, meta, scale=self.scale, sliding_window=sliding_window, logits_soft_cap=self.soft_cap
        )
        return self.o_proj(out.reshape(x.shape[0], -1).astype(x.dtype)), cache


class MLP(nnx.Module):
    """SwiGLU or GeGLU (Shazeer): ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = _linear(hidden, inner, bias, dtype, rngs)
        self.up_proj = _linear(hidden, inner, bias, dtype, rngs)
        self.down_proj = _linear(inner, hidden, bias, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _ACTIVATIONS[self.activation](self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each normalised on the way in and added to the residual stream ``x`` [T, hidden].

    With ``post_norms`` each is normalised on the way out too. The names are Hugging Face's, where
    ``post_attention_layernorm`` is Llama's norm before the MLP, and Gemma's of what attention gives.
    """

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.post_norms = config.post_norms
        self.input_layernorm = RMSNorm(config.hidden_size, config, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, dtype)
        self.mlp = MLP(config, dtype, rngs)
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config, dtype)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config, dtype)

    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache,
        layer: jax.Array,
        rotary: RotaryTable,
        meta: AttentionMetadata,
        sliding_window: Any,
    ) -> tuple[jax.Array, LayerCache]:
        attended, cache = self.self_attn(self.input_layernorm(x), cache, layer, rotary, meta, sliding_window)
        if not self.post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), cache
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache
