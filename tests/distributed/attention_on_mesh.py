"""Batches over a cache on a mesh, and the same attention over lists of tokens in float64."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax import DType, KVCacheConfig, PagedKVCache
from pyagent_kv_jax.distributed import CacheSharding, ShardedKVPages, sharded_cache
from tests.pallas_kernels import numpy_reference

LAYERS, ROWS, TOKENS, DIM, BLOCKS = 2, 6, 64, 8, 20
STEPS = {
    "prefill": [0, 1, 2, 9, 30, 5],
    "chunked prefill": [3, 1, 0, 17, 25, 0],
    "decode": [1, 1, 1, 1, 1, 0],
    "mixed": [1, 20, 1, 1, 14, 0],
}
"""Query lengths of the rows, one step after another; rows are empty, of one token, shorter than there are ranks."""


def config_for(sharding: CacheSharding, kv_heads: int, slots: int = 16, **options: Any) -> KVCacheConfig:
    """Blocks of ``slots`` slots on each context rank."""
    sizes = {"num_layers": LAYERS, "num_heads": kv_heads, "head_dim": DIM, "num_blocks": BLOCKS}
    sizes |= {"block_size": slots * sharding.context_size, "max_num_reqs": ROWS, "max_model_len": 4096}
    return KVCacheConfig(**{**sizes, "dtype": DType.FLOAT32, **options})


@dataclasses.dataclass
class Contexts:
    """K and V of every row's tokens so far, by layer, and attention over them."""

    keys: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def empty(cls, kv_heads: int) -> Contexts:
        nothing = np.zeros((LAYERS, 0, kv_heads, DIM))
        return cls([nothing] * ROWS, [nothing] * ROWS)

    def attend(self, lens: Any, q: Any, k: Any, v: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """q, k, v [LAYERS, TOKENS, heads, DIM] of rows one after another: (out, lse), after appending k and v."""
        window = options.pop("sliding_window", None)
        options = {"scale": DIM**-0.5, "logits_soft_cap": None, "sinks": None, **options}
        out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
        start = 0
        for row, count in enumerate(lens):
            at, context = slice(start, start + count), self.keys[row].shape[1]
            self.keys[row] = np.concatenate([self.keys[row], k[:, at]], axis=1)
            self.values[row] = np.concatenate([self.values[row], v[:, at]], axis=1)
            for i in range(count):
                seen = numpy_reference.visible_positions(context + i, context + count, sliding_window=window)
                for layer in range(LAYERS):
                    keys, values = self.keys[row][layer][seen], self.values[row][layer][seen]
                    out[layer, start + i], lse[layer, start + i] = numpy_reference.attend_one(
                        q[layer, start + i].astype(np.float64), keys, values, **options
                    )
            start += count
        return out, lse


def random_step(rng: np.random.Generator, q_heads: int, kv_heads: int) -> list[np.ndarray]:
    """q, k and v [LAYERS, TOKENS, heads, DIM] of one step."""
    shapes = [(LAYERS, TOKENS, heads, DIM) for heads in (q_heads, kv_heads, kv_heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def empty_cache(config: KVCacheConfig, sharding: CacheSharding) -> PagedKVCache:
    """With NaN in every slot: what nobody wrote must not be read."""
    cache = sharded_cache(config, sharding)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (cache.pages.k_pages, cache.pages.v_pages))
    pages = dataclasses.replace(cache.pages, k_pages=poisoned[0], v_pages=poisoned[1])
    return dataclasses.replace(cache, pages=pages)


@partial(jax.jit, donate_argnums=0, static_argnames=("num_tokens", "options"))
def attend_all_layers(
    cache: PagedKVCache,
    lens: Any,
    q: Any,
    k: Any,
    v: Any,
    num_tokens: int | None = TOKENS,
    options: Any = (),
    **arrays: Any,
) -> tuple[jax.Array, jax.Array, PagedKVCache]:
    """One step of ``q``, ``k``, ``v`` over all layers: (out, lse) [LAYERS, tokens, ...] and the cache."""
    cache, meta = cache.extend(lens, num_tokens=num_tokens)

    def layer(pages: ShardedKVPages, inputs: Any) -> Any:
        out, lse, pages = pages.attend_with_lse(inputs[0], *inputs[1:], meta, **dict(options), **arrays)
        return pages, (out, lse)

    pages, (out, lse) = jax.lax.scan(layer, cache.pages, (jnp.arange(LAYERS), q, k, v))
    return out, lse, dataclasses.replace(cache, pages=pages)
