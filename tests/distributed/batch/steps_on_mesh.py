"""Batches for executors over a cache on a mesh, beside the same attention in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.distributed import CacheSharding, ShardedKVPages
from pyagent_kv_jax.distributed.batch import BatchOutput, BatchRequest, DCPPlanConfig, ExecutionPlan
from tests.distributed.attention_on_mesh import DIM, LAYERS, ROWS, TOKENS, Contexts, config_for

BLOCKS = 30  # five a row
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def plan_config(
    sharding: CacheSharding, q_heads: int, kv_heads: int, slots: int = 16, cache: Any = (), **sizes: Any
) -> DCPPlanConfig:
    """Batches are of one size, ROWS and TOKENS, unless ``sizes`` say otherwise."""
    sizes = {"row_buckets": (ROWS,), "token_buckets": (TOKENS,), **sizes}
    return DCPPlanConfig(
        config_for(sharding, kv_heads, slots, **{"num_blocks": BLOCKS, **dict(cache)}), sharding, q_heads, **sizes
    )


def poisoned_pages(config: DCPPlanConfig) -> ShardedKVPages:
    """With NaN in every slot: what nobody wrote must not be read."""
    pages = ShardedKVPages.create(config.cache, config.sharding)
    arrays = {name: jnp.full_like(getattr(pages, name), jnp.nan) for name in ("k_pages", "v_pages")}
    return dataclasses.replace(pages, **arrays)


def blocks_of_rows(seed: int = 0) -> list[list[int]]:
    """Blocks for each row, none twice, in no order."""
    ids = np.random.default_rng(seed).permutation(BLOCKS)
    return [ids[row::ROWS].tolist() for row in range(ROWS)]


def requests_for(lens: Any, contexts: Any, **options: Any) -> list[BatchRequest]:
    """Row r is request "r"; it brings lens[r] tokens after contexts[r]."""
    held = blocks_of_rows()
    pairs = enumerate(zip(lens, contexts, strict=True))
    return [BatchRequest(f"{row}", held[row], new, old, **options) for row, (new, old) in pairs]


@dataclasses.dataclass
class Steps:
    """A cache under test and what it should hold, moving together."""

    config: DCPPlanConfig
    pages: ShardedKVPages
    contexts: Contexts

    @classmethod
    def start(cls, config: DCPPlanConfig) -> Steps:
        return cls(config, poisoned_pages(config), Contexts.empty(config.cache.num_heads))

    def requests(self, lens: Any, **options: Any) -> list[BatchRequest]:
        """The next step of every row."""
        return requests_for(lens, [keys.shape[1] for keys in self.contexts.keys], **options)

    def arrays(self, seed: int, num_tokens: int = TOKENS) -> list[np.ndarray]:
        """q, k and v [LAYERS, num_tokens, heads, DIM]."""
        rng, kv_heads = np.random.default_rng(seed), self.config.cache.num_heads
        shapes = [(LAYERS, num_tokens, heads, DIM) for heads in (self.config.num_q_heads, kv_heads, kv_heads)]
        return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def run(self, executor: Any, plan: ExecutionPlan, seed: int = 0, **options: Any) -> None:
        """``plan`` on all layers, compared."""
        arrays = self.arrays(seed, plan.num_tokens)

        def layer(index: int, *parts: np.ndarray) -> BatchOutput:
            return executor.run(plan, self.pages, index, *parts, **options)

        self.compare(layer, plan.batch.query_lens, arrays, **options)

    def process(self, executor: Any, lens: Any, seed: int = 0, **options: Any) -> None:
        """One step through ``process_batch`` with as many tokens as there are, compared."""
        arrays, requests = self.arrays(seed, sum(lens)), self.requests(lens)

        def layer(index: int, *parts: np.ndarray) -> BatchOutput:
            return executor.process_batch(requests, self.pages, index, *parts, **options)

        self.compare(layer, lens, arrays, **options)

    def compare(self, run: Any, lens: Any, arrays: list[np.ndarray], **options: Any) -> None:
        outs, lses = [], []
        for index in range(LAYERS):
            out, lse, self.pages = run(index, *(x[index] for x in arrays))
            outs.append(jax.device_get(out))
            lses.append(jax.device_get(lse))
        want_out, want_lse = self.contexts.attend(lens, *arrays, **options)
        np.testing.assert_allclose(np.stack(outs), want_out, **TOLERANCE)
        np.testing.assert_allclose(np.stack(lses), want_lse, **TOLERANCE)
