"""Llama, Qwen and Gemma 3 in Flax NNX over a paged cache, and their Hugging Face directories."""

from pyagent_kv_jax.models.config import LlamaConfig
from pyagent_kv_jax.models.hf_config import config_from_hf, config_to_hf
from pyagent_kv_jax.models.llama import LlamaForCausalLM
from pyagent_kv_jax.models.loading import load_config, load_model, load_tokenizer, save_model
from pyagent_kv_jax.models.rope import RopeConfig

__all__ = [
    "LlamaConfig",
    "LlamaForCausalLM",
    "RopeConfig",
    "config_from_hf",
    "config_to_hf",
    "load_config",
    "load_model",
    "load_tokenizer",
    "save_model",
]
