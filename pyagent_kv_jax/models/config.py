"""Sizes and switches of a Llama-family model: one frozen dataclass drives every model of the family."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama family (Llama 3, Qwen2, Qwen3), static under ``jit``.

    ``models.hf_config.parse_config`` makes one from a Hugging Face ``config.json``.

    Attributes:
        vocab_size: rows of the embedding, and logits of a token.
        hidden_size: elements of the residual stream.
        intermediate_size: elements inside the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: elements of a head.
        max_position_embeddings: longest sequence the model was made for.
        rms_norm_eps: added to the mean square in each RMSNorm.
        rope: rotary embedding.
        tie_word_embeddings: whether the embedding is also the output projection.
        qkv_bias: whether the q, k and v projections have biases (Qwen2).
        o_bias: whether the output projection of attention has one.
        mlp_bias: whether the three MLP projections have them.
        qk_norm: whether q and k go through an RMSNorm over each head (Qwen3).
        layer_windows: one entry a layer: tokens a query sees, itself included; None: all. Empty: all see all.
        architecture: the Hugging Face class name, for ``save_model``.
        bos_token_id: token that starts a text, if any.
        eos_token_ids: tokens that end one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def kv_cache_config(self, **overrides: Any) -> KVCacheConfig:
        """The cache that fits this model; ``overrides`` are fields of ``KVCacheConfig``.

        Raises:
            ConfigError: as ``KVCacheConfig``.
        """
        fitting = {
            "num_layers": self.num_layers,
            "num_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_model_len": self.max_position_embeddings,
        }
        return KVCacheConfig(**{**fitting, **overrides})
