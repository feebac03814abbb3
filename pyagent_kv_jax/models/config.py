"""Sizes and switches of a decoder: one frozen dataclass drives Llama, Qwen and Gemma 3 alike."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from pyagent_kv_jax import config as cache_config
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import ConfigError
from pyagent_kv_jax.models.rope import RopeConfig

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama family and its kin (Llama 3, Qwen2, Qwen3, Gemma 3), static under ``jit``.

    ``config_from_hf`` makes one from a Hugging Face ``config.json``. The defaults of the switches are Llama's.

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
        local_rope: another one for the layers that have a window (Gemma 3). None: the same.
        tie_word_embeddings: whether the embedding is also the output projection.
        qkv_bias: whether the q, k and v projections have biases (Qwen2).
        o_bias: whether the output projection of attention has one.
        mlp_bias: whether the three MLP projections have them.
        qk_norm: whether q and k go through an RMSNorm over each head (Qwen3, Gemma 3).
        layer_windows: one entry a layer: tokens a query sees, itself included; None: all. Empty: all see all.
        activation: of the MLP's gate: ``"silu"``, or ``"gelu_tanh"``, GELU by its tanh formula (Gemma 3).
        norm_plus_one: whether RMSNorms multiply by one plus their weight, in float32 (Gemma 3).
        post_norms: whether attention and MLP are normalised on the way out too (Gemma 3).
        scale_embeddings: whether embeddings are multiplied by ``sqrt(hidden_size)`` (Gemma 3).
        query_pre_attn_scalar: attention scores are multiplied by its ``** -0.5`` (Gemma 3). None: ``head_dim``.
        attn_logit_soft_cap: c, where scores s become ``c * tanh(s / c)``. None: they stay.
        final_logit_soft_cap: the same for the logits.
        architecture: the Hugging Face class name, for ``save_model``.
        bos_token_id: token that starts a text, if any.
        eos_token_ids: tokens that end one.

    Raises:
        ConfigError: windows for another number of layers, or an unknown activation.
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
    local_rope: RopeConfig | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    activation: Activation = "silu"
    norm_plus_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_soft_cap: float | None = None
    final_logit_soft_cap: float | None = None
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                f"LlamaConfig.layer_windows: got {self.layer_windows}, want one for each of {self.num_layers} layers"
            )
        if self.activation not in get_args(Activation):
            raise ConfigError(f"LlamaConfig.activation: got {self.activation!r}, want one of {get_args(Activation)}")

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied by. None: ``head_dim ** -0.5``, which caches take by themselves."""
        return None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5

    def kv_cache_config(self, *, group_layers: bool = False, **overrides: Any) -> KVCacheConfig:
        """The cache that fits this model.

        Args:
            group_layers: whether layers with a window keep only what it shows, in groups of their own. Without: one
                group of all layers, which keeps all tokens. The same for a model without windows.
            overrides: fields of ``KVCacheConfig``.

        Raises:
            ConfigError: as ``KVCacheConfig``.
        """
        fitting: dict[str, Any] = {
            "num_layers": self.num_layers,
            "num_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_model_len": self.max_position_embeddings,
        }
        if group_layers:
            fitting["layer_groups"] = cache_config.group_layers(self.layer_windows)
        return KVCacheConfig(**{**fitting, **overrides})
