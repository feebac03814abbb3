"""Arrays for an ``AttentionCase``: real keys where some query may look, poison everywhere else."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.pallas_kernels import numpy_reference
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.stored_numbers import encode, logical, poison

Array = NDArray[Any]


@dataclasses.dataclass
class AttentionInputs:
    """Arguments of one call and, in float64, what it must return."""

    arguments: dict[str, Any]
    out: Array
    lse: Array


def make_inputs(case: AttentionCase) -> AttentionInputs:
    """Random, but the same for the same case."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    kv_lens, loc, tokens = _lengths(case)
    tables, positions, num_pages = _tables(rng, case, kv_lens, loc)
    v_head_dim = case.v_head_dim or case.head_dim
    k_scale, v_scale = _scale(rng, case, case.k_scale), _scale(rng, case, case.v_scale)
    readable = _readable(case, tables, positions, kv_lens, loc)
    k_shape = (num_pages, case.kv_heads, case.block_size, case.storage_head_dim or case.head_dim)
    v_shape = (*k_shape[:3], case.v_storage_head_dim or v_head_dim)
    k_stored, k_values = _pages(rng, case, k_shape, case.head_dim, k_scale, readable)
    v_stored, v_values = _pages(rng, case, v_shape, v_head_dim, v_scale, readable)
    q = rng.standard_normal((tokens, case.q_heads, case.head_dim)).astype(logical(case.q_dtype))
    sinks = rng.standard_normal(case.q_heads).astype(np.float32) if case.sinks else None
    mask = {name: getattr(case, name) for name in ("causal", "sliding_window", "chunk_size")}
    out, lse = numpy_reference.paged_attention(
        q.astype(np.float64),
        k_values,
        v_values[..., :v_head_dim],
        tables,
        kv_lens,
        loc,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        logits_soft_cap=case.logits_soft_cap,
        sinks=sinks,
        block_positions=positions,
        context_parallel=case.context_parallel,
        **mask,
    )
    arguments = {
        "q": q,
        "k_pages": k_stored,
        "v_pages": v_stored,
        "block_tables": tables,
        "kv_lens": kv_lens,
        "query_start_loc": loc,
        "block_positions": positions,
        "scale": case.scale,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "kv_dtype": case.kv_dtype if case.stored_as else None,
        "v_head_dim": case.v_head_dim,
        **case.options,
    }
    return AttentionInputs(arguments, out, lse)


def _lengths(case: AttentionCase) -> tuple[Array, Array | None, int]:
    kv_lens = np.array(case.kv_lens + (0,) * case.num_padding_sequences, np.int32)
    if case.query_lens is None:
        return kv_lens, None, len(kv_lens)
    query_lens = case.query_lens + (0,) * case.num_padding_sequences
    loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return kv_lens, loc, int(loc[-1]) + case.num_padding_tokens


def _tables(
    rng: np.random.Generator, case: AttentionCase, kv_lens: Array, loc: Array | None
) -> tuple[Array, Array | None, int]:
    """Tables of pages in random order, some pages left over; page 0 and the last belong to nobody."""
    covered = case.block_size * (case.context_parallel[0] if case.context_parallel else 1)
    counts = -(-kv_lens // covered)
    width = max(int(counts.max(initial=0)), 1) + case.num_padding_columns
    num_pages = int(counts.sum()) + 3
    order = rng.permutation(np.arange(1, num_pages - 1))
    tables = np.full((len(kv_lens), width), -1, np.int32)
    positions = np.full_like(tables, -1)
    taken = 0
    for s, count in enumerate(counts):
        tables[s, :count] = order[taken : taken + count]
        positions[s, :count] = np.arange(count) * covered
        taken += count
    for s, column in case.holes:
        tables[s, column] = -1
    if case.positions == "trimmed":
        for s, base in np.ndindex(*tables.shape):
            seen = _seen(case, kv_lens, loc, s)
            if not any(positions[s, base] <= x < positions[s, base] + covered for x in seen):
                tables[s, base] = positions[s, base] = -1
        shift = [np.argsort(row < 0, kind="stable") for row in positions]
        tables = np.stack([row[i] for row, i in zip(tables, shift, strict=True)])
        positions = np.stack([row[i] for row, i in zip(positions, shift, strict=True)])
    if case.positions == "shuffled":
        shuffle = np.argsort(rng.random(tables.shape), axis=1)
        tables, positions = np.take_along_axis(tables, shuffle, 1), np.take_along_axis(positions, shuffle, 1)
    return tables, positions if case.positions else None, num_pages


def _seen(case: AttentionCase, kv_lens: Array, loc: Array | None, s: int) -> set[int]:
    """Positions of sequence ``s`` that some query of it sees."""
    query_len = 1 if loc is None else int(loc[s + 1] - loc[s])
    kv_len = int(kv_lens[s])
    seen: set[int] = set()
    for position in range(kv_len - query_len, kv_len):
        seen |= set(
            numpy_reference.visible_positions(
                position,
                kv_len,
                causal=case.causal,
                sliding_window=case.sliding_window,
                chunk_size=case.chunk_size,
            )
        )
    return seen


def _readable(
    case: AttentionCase, tables: Array, positions: Array | None, kv_lens: Array, loc: Array | None
) -> list[tuple[int, int]]:
    """Every (page, offset) that some query may look at."""
    places = []
    for s in range(len(kv_lens)):
        at = None if positions is None else positions[s]
        for x in sorted(_seen(case, kv_lens, loc, s)):
            place = numpy_reference.find_key(x, tables[s], case.block_size, at, case.context_parallel)
            if place is not None:
                places.append(place)
    return places


def _scale(rng: np.random.Generator, case: AttentionCase, kind: str | None) -> Array | None:
    if kind is None:
        return None
    largest = 0.03 if case.kv_dtype == "int8" else 1.5
    shape = () if kind == "tensor" else (case.kv_heads,)
    return np.asarray(rng.uniform(0.5 * largest, largest, shape), np.float32)


def _pages(
    rng: np.random.Generator,
    case: AttentionCase,
    shape: tuple[int, ...],
    head_dim: int,
    scale: Array | None,
    readable: list[tuple[int, int]],
) -> tuple[Array, Array]:
    """(pages as stored, the same in float64 with the scale applied)."""
    dtype = logical(case.kv_dtype)
    pages = poison(shape, dtype)
    divisor = np.ones(()) if scale is None else scale[..., None]
    for page, offset in readable:
        values = rng.standard_normal((case.kv_heads, head_dim)) / divisor
        pages[page, :, offset, :head_dim] = encode(values, dtype)
    factor = np.ones(()) if scale is None else scale.astype(np.float64)[..., None, None]
    values = pages.astype(np.float64) * factor
    return (pages.view(case.stored_as) if case.stored_as else pages), values
