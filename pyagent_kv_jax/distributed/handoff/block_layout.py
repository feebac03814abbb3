"""Blocks in a form that no mesh shows in: what travels between two sides that lay their pages out differently.

Canonical blocks are unsigned integers (the bits of what is stored) of shape

    [layers_per_group, n, num_heads, block_size, head_dim]

with a block's tokens in the order of the sequence, each KV head once, and no padding in the last axis. What differs
from side to side, and is undone here: tokens dealt out to context ranks, heads repeated over tensor ranks, heads padded
to 128 lanes on TPUs, 16-bit floats that are kept as ``uint16`` on CPUs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages

Pages = KVPages | ShardedKVPages
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Blocks(NamedTuple):
    """K and V of n blocks, each [layers_per_group, n, heads, block_size, head_dim]."""

    k: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """How pages of one side hold a block. Static.

    Attributes:
        config: of the cache.
        sharding: over a mesh; None: on one device.
    """

    config: KVCacheConfig
    sharding: CacheSharding | None = None

    @classmethod
    def of(cls, pages: Pages) -> Self:
        """That of ``pages``."""
        return cls(pages.config, pages.sharding if isinstance(pages, ShardedKVPages) else None)

    @property
    def head_copies(self) -> int:
        """How often each KV head is stored, one copy after another."""
        return 1 if self.sharding is None else self.sharding.head_copies(self.config.num_heads)

    @property
    def token_order(self) -> np.ndarray | None:
        """i32[block_size]: which offset of a block stands at each index; None: its own."""
        if self.sharding is None or self.sharding.context_size == 1:
            return None
        return self.sharding.token_order(self.config.block_size)

    def canonical(self, blocks: Blocks) -> Blocks:
        """Canonical blocks of those that ``gather_blocks`` gives."""
        config, order = self.config, self.token_order

        def one(x: jax.Array, head_dim: int) -> jax.Array:
            # As bits from the start: what XLA does to move floats between devices quietens signalling NaNs.
            x = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])[:, :, :: self.head_copies, :, :head_dim]
            return x if order is None else x[:, :, :, np.argsort(order)]

        return Blocks(one(blocks.k, config.head_dim), one(blocks.v, config.value_head_dim))

    def stored(self, blocks: Blocks) -> Blocks:
        """The way back: bits as ``write_blocks`` takes them, of canonical blocks."""
        config, order = self.config, self.token_order

        def one(x: jax.Array, head_dim: int) -> jax.Array:
            if order is not None:
                x = x[:, :, :, order]
            if self.head_copies > 1:
                x = jnp.repeat(x, self.head_copies, axis=2)
            if padding := config.storage_head_dim(head_dim) - head_dim:
                x = jnp.pad(x, ((0, 0),) * 4 + ((0, padding),))
            return x

        return Blocks(one(blocks.k, config.head_dim), one(blocks.v, config.value_head_dim))

    def is_canonical_as_stored(self) -> bool:
        """Whether ``stored`` changes nothing."""
        padded = any(self.config.storage_head_dim(d) != d for d in (self.config.head_dim, self.config.value_head_dim))
        return self.token_order is None and self.head_copies == 1 and not padded

    def canonical_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
        """(shape of K, shape of V, dtype) of so many canonical blocks."""
        config = self.config
        head = (config.layers_per_group, num_blocks, config.num_heads, config.block_size)
        dtype = jnp.dtype(_BITS[config.storage_dtype.itemsize])
        return (*head, config.head_dim), (*head, config.value_head_dim), dtype


def sharding_of_blocks(pages: Pages) -> jax.sharding.Sharding:
    """Where stored blocks have to be, to be written into ``pages`` without another copy."""
    if isinstance(pages, ShardedKVPages):
        return pages.sharding.named(pages.sharding.page_spec(leading=2))
    where = pages.k_pages.sharding
    if isinstance(where, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(where.mesh, P())
    return where
