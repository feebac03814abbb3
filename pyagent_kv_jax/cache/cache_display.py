"""How a cache and the metadata of a step show themselves. Never reads the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.notebook_display import (
    MOST_ROWS,
    Rows,
    attempt,
    card,
    counted,
    fields_html,
    fields_line,
    shape_text,
    size_text,
    waste_text,
)
from pyagent_kv_jax.pool.pool_display import pool_counts
from pyagent_kv_jax.tables.table_display import row_counts

_FIELDS = ("pages", "pool", "table")
_METADATA = ("block_tables", "kv_lens", "query_start_loc", "slot_mapping", "positions", "ok")


def config_text(config: KVCacheConfig) -> str:
    """Layers, heads, sizes, bytes."""
    dims = (
        f"{config.head_dim}"
        if config.head_dim == config.value_head_dim
        else (f"{config.head_dim} (K) and {config.value_head_dim} (V)")
    )
    groups = f" in {len(config.groups)} groups" if len(config.groups) > 1 else ""
    blocks = f"{counted(config.pool_blocks, 'block')} of {config.block_size} tokens"
    total = size_text(config.pool_blocks * config.block_size_bytes())
    layers, heads = counted(config.num_layers, "layer") + groups, counted(config.num_heads, "head")
    return f"{layers}, {heads} of {dims}, {config.kv_dtype.value}, {blocks}, {total}"


def request_rows(names: Sequence[str], tokens: np.ndarray, blocks: np.ndarray, config: KVCacheConfig) -> Rows:
    """Who holds what: the first few of n names, i64[n] tokens and i64[n] blocks of one layer group."""
    cells = [
        (name, count, held, waste_text(count, held * config.block_size))
        for name, count, held in zip(names[:MOST_ROWS], tokens.tolist(), blocks.tolist(), strict=False)
    ]
    return Rows(("", "tokens", "blocks", "empty"), cells, len(names), "rows in use")


def cache_line(cache: Any) -> str:
    """A ``PagedKVCache`` in one line. Reads the counters of pool and table, O(rows)."""

    def line() -> str:
        counts, rows = pool_counts(cache.pool), row_counts(cache.table)
        if counts is None or rows is None:
            now = f"pages {shape_text(getattr(cache.pages, 'k_pages', cache.pages))}, no values here"
        else:
            tokens, held = int(rows.num_tokens.sum()), counted(len(rows.rows), "row")
            now = f"{counted(counts.held, 'block')} held, {counted(tokens, 'token')} in {held}"
        return f"PagedKVCache({config_text(cache.config)}: {now})"

    return attempt(line, lambda: fields_line(cache, _FIELDS))


def cache_html(cache: Any) -> str:
    """A ``PagedKVCache`` for a notebook. Reads the counters of pool and table, O(rows)."""

    def html() -> str:
        config, counts, rows = cache.config, pool_counts(cache.pool), row_counts(cache.table)
        if counts is None or rows is None:
            pages = shape_text(getattr(cache.pages, "k_pages", cache.pages))
            return card("PagedKVCache", f"{config_text(config)}; pages {pages}, no values here")
        names = [f"row {row}" for row in rows.rows.tolist()]
        of_rows = request_rows(names, rows.num_tokens, rows.num_blocks, config)
        return card("PagedKVCache", config_text(config), bar=counts.bar(), rows=of_rows)

    return attempt(html, lambda: fields_html(cache, _FIELDS))


def metadata_line(meta: Any) -> str:
    """``AttentionMetadata`` in one line: shapes, and the static bounds. Reads nothing."""

    def line() -> str:
        bounds: list[Any] = [f"max_query_len={meta.max_query_len}", f"max_kv_len={meta.max_kv_len}"]
        shapes = [f"{name}={shape_text(getattr(meta, name))}" for name in _METADATA]
        return f"AttentionMetadata({', '.join([*shapes, *bounds])})"

    return attempt(line, lambda: fields_line(meta, _METADATA))
