"""Which keys a query sees: always one interval of positions, so one pair of numbers says it.

Causality, the sliding window and chunks each cut the interval at an end. Both ends grow with the query's
position; so what *some* query of a tile sees runs from the first one's start to the last one's end, and what
*all* of them see from the last one's start to the first one's end.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.checking import check


@partial(jax.tree_util.register_dataclass, data_fields=["sliding_window", "chunk_size"], meta_fields=["causal"])
@dataclasses.dataclass(frozen=True)
class Visibility:
    """The mask, but for lengths.

    Attributes:
        causal: static; a query sees nothing after itself.
        sliding_window: None or i32[]; a query at p sees nothing at or before p - window.
        chunk_size: None or i32[]; a query sees only its own chunk of that many positions.
    """

    causal: bool
    sliding_window: jax.Array | None
    chunk_size: jax.Array | None

    def report(self) -> None:
        """In checking mode, an error unless the window and the chunk hold at least one position."""
        for name, size in (("sliding_window", self.sliding_window), ("chunk_size", self.chunk_size)):
            if size is not None:
                message = f"{name}: got {{size}}, want at least 1"
                check(jnp.asarray(size) >= 1, message, size=jnp.asarray(size))

    def interval(self, position: jax.Array, kv_len: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and one past the last position seen from ``position`` i32[...]; a negative one sees none."""
        at = jnp.maximum(position, 0)
        start, end = jnp.zeros_like(at), jnp.broadcast_to(kv_len, at.shape)
        if self.causal:
            end = jnp.minimum(end, at + 1)
        if self.sliding_window is not None:
            start = jnp.maximum(start, at - (self.sliding_window - 1))
        if self.chunk_size is not None:
            chunk = jnp.maximum(self.chunk_size, 1)
            chunk_start = at - at % chunk
            start, end = jnp.maximum(start, chunk_start), jnp.minimum(end - chunk_start, chunk) + chunk_start
        return start, jnp.where(position >= 0, end, 0)
