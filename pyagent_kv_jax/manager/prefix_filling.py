"""Entering into the prefix cache what a step fills: planned while the step is under way, done when it has answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pyagent_kv_jax.manager.prefix.events import BlockStored, EventLog
from pyagent_kv_jax.manager.prefix.known_tokens import FullBlocks, KnownTokens
from pyagent_kv_jax.manager.prefix.prefix_cache import Claim, PrefixCache
from pyagent_kv_jax.manager.request_start import Start


class Filling(NamedTuple):
    """Blocks that a step fills, before it is known which they are."""

    full: FullBlocks
    claim: Claim | None


class PrefixFiller:
    """Knows whose blocks are full, and gives them to the prefix cache under their keys."""

    def __init__(self, tokens: KnownTokens, prefixes: PrefixCache, events: EventLog) -> None:
        self._tokens = tokens
        self._prefixes = prefixes
        self._events = events

    def plan(self, rows: np.ndarray, lengths: np.ndarray, starts: Mapping[int, Start] = {}) -> Filling | None:
        """What is to be entered once ``rows`` i32[n] hold ``lengths`` i64[n] tokens that are no drafts; None: nothing.

        ``starts``, by index, of those that have not taken their rows yet. To be given to ``enter``, nothing looked up
        before.
        """
        full, block_size = self._tokens.newly_full(rows, lengths), self._prefixes.block_size
        if starts:
            full = full.and_those_of(
                [
                    (i, int(rows[i]), start.record.keys, start.hit.blocks.shape[1], int(lengths[i]) // block_size)
                    for i, start in starts.items()
                    if start.record is not None
                ]
            )
        return Filling(full, self._prefixes.claim(full.runs())) if full.keys else None

    def enter(self, filling: Filling, ok: np.ndarray, tables: np.ndarray, hollow: np.ndarray) -> list[np.ndarray]:
        """What the ``ok`` bool[n] have filled can be hit from now on.

        Args:
            filling: the plan.
            ok: of the batch.
            tables: i32[n, columns], or i32[G, n, columns] of several groups; -1 for those that are not ok.
            hollow: i32[G, R], leading tokens of each row that its blocks do not hold.

        Returns:
            i32[...] for each group, the blocks whose content is worth keeping now.
        """
        full, claim = filling
        self._tokens.enter(full if ok.all() else full.of(ok))
        at, columns = full.entries()
        has_hollow, of_groups = hollow.any(), []
        for group, table in enumerate(tables if tables.ndim == 3 else tables[None]):
            ids = table[at, columns]
            if has_hollow:
                first_tokens = columns * self._prefixes.block_size
                ids = np.where(first_tokens < hollow[group, full.rows_of_entries()], -1, ids)
            if claim is not None:
                entered = self._prefixes.enter(group, claim, ids)
            else:
                ends = np.cumsum(full.last - full.first)
                runs = zip(full.runs(), np.split(ids, ends[:-1]), strict=True)
                entered = np.concatenate([self._prefixes.insert(group, k, first, run) for (k, first, _), run in runs])
            of_groups.append(entered)
            if self._events.enabled:
                self._tell_stored(group, full, ids, entered)
        return of_groups

    def _tell_stored(self, group: int, full: FullBlocks, ids: np.ndarray, entered: np.ndarray) -> None:
        stored, start = np.isin(ids, entered), 0
        for keys, column, last in full.runs():
            for first, end in runs(stored[start : start + last - column]):
                blocks = ids[start + first : start + end].tolist()
                digests = keys.digests[column + first : column + end]
                self._events.append(
                    BlockStored(
                        group, tuple(blocks), tuple(digests), keys.parent_of(column + first), keys.extras.adapter
                    )
                )
            start += last - column


def runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of each run of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
