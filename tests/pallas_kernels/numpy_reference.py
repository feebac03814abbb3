"""The five operations again, in float64 numpy and plain loops: written for being obviously right, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def visible_positions(
    position: int,
    kv_len: int,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
) -> list[int]:
    """The key positions that the query at ``position`` sees."""
    seen = []
    for x in range(kv_len if position >= 0 else 0):
        if causal and x > position:
            continue
        if sliding_window is not None and x <= position - sliding_window:
            continue
        if chunk_size is not None and x // chunk_size != position // chunk_size:
            continue
        seen.append(x)
    return seen


def find_key(
    x: int, table: Array, block_size: int, positions: Array | None, context_parallel: tuple[int, int, int] | None
) -> tuple[int, int] | None:
    """(page, offset) of the key at position x, or None where this rank or this table does not hold it."""
    size, rank, interleave = context_parallel or (1, 0, 1)
    virtual = block_size * size
    if positions is None:
        column, o = x // virtual, x % virtual
    else:
        columns = [c for c, base in enumerate(positions) if base >= 0 and base <= x < base + virtual]
        if not columns:
            return None
        column, o = columns[0], x - int(positions[columns[0]])
    if (o // interleave) % size != rank or column >= len(table) or table[column] < 0:
        return None
    return int(table[column]), (o // (size * interleave)) * interleave + o % interleave


def attend_one(
    q: Array, keys: Array, values: Array, *, scale: float, logits_soft_cap: float | None, sinks: Array | None
) -> tuple[Array, Array]:
    """q [q_heads, d], keys [n, kv_heads, d], values [n, kv_heads, dv]: (out [q_heads, dv], lse [q_heads])."""
    q_heads, group = q.shape[0], q.shape[0] // keys.shape[1]
    out, lse = np.zeros((q_heads, values.shape[-1])), np.full(q_heads, -np.inf)
    for head in range(q_heads):
        logits = keys[:, head // group] @ q[head] * scale
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        everything = logits if sinks is None else np.append(logits, sinks[head])
        if everything.size == 0 or everything.max() == -np.inf:
            continue
        lse[head] = np.log(np.sum(np.exp(everything - everything.max()))) + everything.max()
        out[head] = np.exp(logits - lse[head]) @ values[:, head // group]
    return out, lse


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    query_start_loc: Array | None,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    block_positions: Array | None = None,
    context_parallel: tuple[int, int, int] | None = None,
    **mask: Any,
) -> tuple[Array, Array]:
    """Float64 pages in, one query at a time, reading nothing but the keys that query sees."""
    tokens, q_heads, head_dim = q.shape
    seqs, block_size = len(kv_lens), k_pages.shape[2]
    loc = np.arange(seqs + 1) if query_start_loc is None else query_start_loc
    out, lse = np.zeros((tokens, q_heads, v_pages.shape[-1])), np.full((tokens, q_heads), -np.inf)
    for s in range(seqs):
        positions = None if block_positions is None else block_positions[s]
        for token in range(loc[s], loc[s + 1]):
            position = int(kv_lens[s]) - int(loc[s + 1]) + token
            if position < 0:
                continue
            found = [
                find_key(x, block_tables[s], block_size, positions, context_parallel)
                for x in visible_positions(position, int(kv_lens[s]), **mask)
            ]
            places = [place for place in found if place is not None]
            pages, offsets = [p for p, _ in places], [o for _, o in places]
            keys, values = k_pages[pages, :, offsets, :head_dim], v_pages[pages, :, offsets]
            out[token], lse[token] = attend_one(
                q[token], keys, values, scale=scale, logits_soft_cap=logits_soft_cap, sinks=sinks
            )
    return out, lse


def paged_write(pages: Array, rows: Array, slots: list[int]) -> Array:
    """``rows`` [T, kv_heads, d], already as stored, into ``slots``; one at a time."""
    pages, block_size = pages.copy(), pages.shape[2]
    for row, slot in zip(rows, slots, strict=True):
        if 0 <= slot < pages.shape[0] * block_size:
            pages[slot // block_size, :, slot % block_size, : rows.shape[-1]] = row
    return pages


def paged_copy(pages: Array, src: Array, dst: Array) -> Array:
    """All reads before all writes."""
    before, after = pages.copy(), pages.copy()
    for s, d in zip(src, dst, strict=True):
        if 0 <= s < len(pages) and 0 <= d < len(pages):
            after[d] = before[s]
    return after


def paged_gather(pages: Array, ids: Array) -> Array:
    """Pages by id; zeros where there is none."""
    empty = np.zeros_like(pages[0])
    return np.stack([pages[i] if 0 <= i < len(pages) else empty for i in ids]) if len(ids) else pages[:0]


def merge_attention_states(outs: Array, lses: Array) -> tuple[Array, Array]:
    """One row at a time, over the states that saw something."""
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for row in np.ndindex(*lses.shape[1:]):
        states = [i for i in range(len(lses)) if np.isfinite(lses[(i, *row)])]
        if states:
            weights = np.array([lses[(i, *row)] for i in states])
            lse[row] = np.log(np.sum(np.exp(weights - weights.max()))) + weights.max()
            out[row] = sum(np.exp(w - lse[row]) * outs[(i, *row)] for w, i in zip(weights, states, strict=True))
    return out, lse
