"""Which tokens of a sequence one rank holds when its context is spread over several, token by token.

With C ranks and interleave I, tokens go round the ranks I at a time: the token at position x is on rank
``(x // I) % C``, and each rank keeps its own tokens one after another. One rank holding everything is C = 1.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["rank"], meta_fields=["size", "interleave"])
@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """``size`` ranks (static), this one's ``rank`` (i32[], may be traced), ``interleave`` (static)."""

    size: int
    rank: int | jax.Array
    interleave: int

    def local_length(self, length: jax.Array) -> jax.Array:
        """How many of the first ``length`` tokens of a sequence are here."""
        if self.size == 1:
            return length
        turn = self.size * self.interleave
        return (length // turn) * self.interleave + jnp.clip(
            length % turn - self.rank * self.interleave, 0, self.interleave
        )

    def position(self, local: jax.Array) -> jax.Array:
        """Position in the sequence of this rank's ``local``-th token."""
        if self.size == 1:
            return local
        turn = self.size * self.interleave
        return (local // self.interleave) * turn + self.rank * self.interleave + local % self.interleave


WHOLE_CONTEXT = ContextParallel(1, 0, 1)
