"""How a manager shows itself. Reads what is there and settles nothing, so that looking at it changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pyagent_kv_jax.cache.cache_display import config_text, request_rows
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.manager.manager_state import ManagerState
from pyagent_kv_jax.notebook_display import MOST_ROWS, Rows, attempt, card, counted
from pyagent_kv_jax.pool.pool_display import PoolCounts

_PATIENCE = 1.0  # seconds to wait for the lock


class ShowsItself:
    """The display methods of ``KVCacheManager``. Both cost O(rows of the table)."""

    config: KVCacheConfig
    _lock: threading.RLock
    _state: ManagerState

    def __repr__(self) -> str:
        def line(state: ManagerState) -> str:
            requests, counts = counted(len(state.rows), "request"), _counts(state)
            return f"KVCacheManager({config_text(self.config)}: {requests}, {counts.text}, {_hit_rate(state)})"

        return self._shown(line, f"KVCacheManager({config_text(self.config)})")

    def _repr_html_(self) -> str:
        plain = card("KVCacheManager", config_text(self.config))
        return self._shown(lambda state: _html(self.config, state), plain)

    def _shown(self, make: Callable[[ManagerState], str], instead: str) -> str:
        """``instead`` where another thread keeps the manager for longer than a second."""
        if not self._lock.acquire(timeout=_PATIENCE):
            return instead
        try:
            return attempt(lambda: make(self._state), lambda: instead)
        finally:
            self._lock.release()


def _counts(state: ManagerState) -> PoolCounts:
    free, cached = state.num_free(), state.num_cached_free()
    return PoolCounts(state.config.pool_blocks - free, cached, free - cached)


def _hit_rate(state: ManagerState) -> str:
    return f"prefix hit rate {state.hit_rate.hit_rate:.0%}"


def _html(config: KVCacheConfig, state: ManagerState) -> str:
    ids = state.rows.ids()
    rows = [state.rows.row_of(request_id) for request_id in ids]
    tokens, columns = state.lengths_now()[rows], state.columns_now()[rows]
    plain = request_rows(ids, tokens, columns, config)
    cached = [_tokens_in_cache(state, row) for row in rows[:MOST_ROWS]]
    cells: list[Any] = [(*row, in_cache) for row, in_cache in zip(plain.cells, cached, strict=True)]
    table = Rows(("request", *plain.head[1:], "tokens in prefix cache"), cells, len(ids), "requests that hold blocks")
    host = f"; {state.swap.num_blocks - state.swap.num_free} of {state.swap.num_blocks} host blocks used"
    away = len(state.swap.requests)
    waiting = f"; {counted(len(state.waiting) + away, 'more request')} without blocks here, {away} in host memory"
    facts = (
        f"{config_text(config)}; {counted(len(ids), 'request')}; {_hit_rate(state)}, "
        f"{counted(len(state.prefixes), 'block')} can be hit"
        + (host if state.swap.num_blocks else "")
        + (waiting if state.waiting or away else "")
    )
    return card("KVCacheManager", facts, bar=_counts(state).bar(), rows=table)


def _tokens_in_cache(state: ManagerState, row: int) -> int:
    """Tokens of a row that others could find in the prefix cache, or that it found there."""
    is_known = state.tokens.record_of(row) is not None
    return state.tokens.columns_entered(row) * state.config.block_size if is_known else 0
