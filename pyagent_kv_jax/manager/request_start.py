"""What a request that holds no row of the tables begins with: cached blocks, or what was swapped out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pyagent_kv_jax.cache.grouped_rows import Hits
from pyagent_kv_jax.manager.prefix.known_tokens import TokenRecord
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit

NO_LIMIT = 2**31 - 1


class Start(NamedTuple):
    """What a request that holds no row begins with.

    Attributes:
        hit: cached blocks.
        num_tokens: tokens not to be computed: the hit's, or all that were swapped out.
        limit: most tokens to be computed now.
        record: its tokens, as far as they are known.
    """

    hit: PrefixHit
    num_tokens: int
    limit: int
    record: TokenRecord | None = None

    @property
    def restored(self) -> int:
        """Tokens brought back from host memory."""
        return self.num_tokens - self.hit.num_tokens

    def with_hit(self, hit: PrefixHit) -> Start:
        """The same, beginning with cached blocks."""
        if self.num_tokens:  # all of these were swapped out, the cached ones among them
            return Start(hit, self.num_tokens, self.limit, self.record)
        return Start(hit, hit.num_tokens, self.limit - hit.num_tokens, self.record)


def hits_of(starts: Mapping[int, Start], num_rows: int) -> Hits | None:
    """The cached blocks that requests, by their index in a batch of ``num_rows``, begin with; None: none."""
    hit = {i: start.hit.blocks for i, start in starts.items() if start.hit.num_tokens}
    if not hit:
        return None
    columns = np.zeros(num_rows, np.int32)
    for i, blocks in hit.items():
        columns[i] = blocks.shape[1]
    return Hits(np.concatenate([blocks.ravel() for blocks in hit.values()]), columns)


def restored_by(starts: Mapping[int, Start], num_rows: int) -> np.ndarray | None:
    """i64[num_rows], tokens that each brings back from host memory; None: none."""
    back = {i: start.restored for i, start in starts.items() if start.restored}
    if not back:
        return None
    restored = np.zeros(num_rows, np.int64)
    restored[list(back)] = list(back.values())
    return restored
