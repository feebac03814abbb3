"""Serving: continuous batching, sampling, text in and out, the command line and the demo."""

from pyagent_kv_jax.serving.cache_backend import CacheBackend
from pyagent_kv_jax.serving.dense_baseline import DenseCacheManager, DenseKVCache
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import GenerationResult, fitting_cache_config, generate, serve
from pyagent_kv_jax.serving.request import Request
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.scheduler import Scheduler, SchedulerConfig, SchedulerStats
from pyagent_kv_jax.serving.text import LLM, IncrementalDetokenizer, TextResult
from pyagent_kv_jax.serving.token_equality import Comparison, compare_tokens

__all__ = [
    "LLM",
    "CacheBackend",
    "Comparison",
    "DenseCacheManager",
    "DenseKVCache",
    "Engine",
    "EngineConfig",
    "GenerationResult",
    "IncrementalDetokenizer",
    "Request",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "TextResult",
    "compare_tokens",
    "fitting_cache_config",
    "generate",
    "serve",
]
