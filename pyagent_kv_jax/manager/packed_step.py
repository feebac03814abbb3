"""The control plane's step as one program: one vector of words in, one vector and the block tables out.

Every array that goes into a jitted call or comes out of it costs microseconds, of which a step is worth some thirty. So
it is told everything in one i32 vector and answers in another.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache import grouped_rows
from pyagent_kv_jax.cache.allocation import step_metadata
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.grouped_rows import Extension, GroupedRows, Hits
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU


class StepShape(NamedTuple):
    """All that a step is compiled for.

    Attributes:
        num_requests: R, rows that may be freed.
        num_groups: G.
        num_rows: B, of the batch.
        num_tokens: T, of the batch; None: decode layout, T = B.
        num_marks: room for blocks whose content became worth keeping.
        free_capacity: most blocks given back by freed rows; 0: none is freed.
        release_capacity: most blocks given back because nobody sees them any more.
        capacity: most blocks given.
        copies: whether blocks may have to be copied.
        max_tokens_per_req: what a row has room for.
        reserves: whether rows may have used, and are given, blocks ahead of their tokens.
    """

    num_requests: int
    num_groups: int
    num_rows: int
    num_tokens: int | None
    num_marks: int
    free_capacity: int
    release_capacity: int
    capacity: int
    copies: bool
    max_tokens_per_req: int
    reserves: bool

    def inputs(self) -> dict[str, slice]:
        """Where in the vector a step is told what."""
        return _inputs(self)

    def outputs(self) -> dict[str, slice]:
        """Where in the vector a step answers what."""
        return _outputs(self)


class Extended(NamedTuple):
    """What an admission did, on the host.

    Attributes:
        ok: bool[n].
        new_ids: i32[...], blocks given that were no hits.
        evicted_ids: i32[...], those of them whose cached content is gone.
        copies: (src, dst) i32[...] each: blocks to be copied before anything is written.
    """

    ok: np.ndarray
    new_ids: np.ndarray
    evicted_ids: np.ndarray
    copies: tuple[np.ndarray, np.ndarray]


_NONE = np.zeros(0, np.int32)


def pack(
    shape: StepShape,
    rows: np.ndarray,
    counts: np.ndarray,
    restored: np.ndarray | None,
    freed: list[int],
    marks: np.ndarray,
    used: np.ndarray | None = None,
    ahead: np.ndarray | None = None,
) -> np.ndarray:
    """The vector of a step over ``rows`` i32[n], n <= B; see ``ControlPlane.begin_step``."""
    at, n = shape.inputs(), len(rows)
    words = np.zeros(at["end"].stop, np.int32)
    words[at["rows"]][n:] = -1
    words[at["rows"]][:n] = rows
    words[at["counts"]][:n] = counts
    if restored is not None:
        words[at["restored"]][:n] = restored
    if freed:
        words[at["freed"]][freed] = 1
    words[at["marks"]][len(marks) :] = -1
    words[at["marks"]][: len(marks)] = marks
    if shape.reserves and used is not None:
        words[at["used"]] = used
    if shape.reserves and ahead is not None:
        words[at["ahead"]][:n] = ahead
    return words


@partial(
    jax.jit,
    donate_argnums=0,
    static_argnames="shape",
    compiler_options=CONTROL_STEP_ON_CPU,
)
def packed_step(
    state: GroupedRows, words: jax.Array, hits: Hits | None, provisional: jax.Array | None, *, shape: StepShape
) -> tuple[GroupedRows, jax.Array, jax.Array]:
    """(state, answer i32[...], block tables i32[B, W], or i32[G, B, W] of several groups)."""
    at = shape.inputs()
    rows, counts, restored = (words[at[name]] for name in ("rows", "counts", "restored"))
    state = grouped_rows.mark_cached(state, words[at["marks"]])
    if shape.reserves:
        state = grouped_rows.advance(state, words[at["used"]])
    if shape.free_capacity:
        state = grouped_rows.free(state, words[at["freed"]] != 0, capacity=shape.free_capacity)
    state = grouped_rows.release_out_of_sight(state, provisional, capacity=shape.release_capacity)
    state, done = grouped_rows.extend(
        state,
        rows,
        restored + counts,
        capacity=shape.capacity,
        hits=hits,
        copies=shape.copies,
        ahead=words[at["ahead"]] if shape.reserves else None,
    )
    ok = done.ok & (rows >= 0)
    lens = jnp.where(ok, counts, 0)
    meta = step_metadata(state.table, rows, lens, ok, shape.num_tokens, num_groups=shape.num_groups)
    return state, _answer(meta, done._replace(ok=ok), shape), meta.block_tables


def _answer(meta: AttentionMetadata, done: Extension, shape: StepShape) -> jax.Array:
    values: dict[str, Any] = {
        "ok": done.ok,
        "kv_lens": meta.kv_lens,
        "query_start_loc": meta.query_start_loc,
        "slot_mapping": meta.slot_mapping,
        "positions": meta.positions,
        "new_ids": done.new_ids,
        "evicted_ids": jnp.where(done.evicted, done.new_ids, -1),
        "copy_src": done.copy_src,
        "copy_dst": done.copy_dst,
    }
    totals = [jnp.sum(values[name] >= 0) for name in ("new_ids", "evicted_ids")]
    totals.append(jnp.sum(done.copy_src >= 0) if done.copy_src is not None else jnp.zeros((), jnp.int32))
    parts = [jnp.stack(totals), *(values[name] for name in shape.outputs() if values.get(name) is not None)]
    return jnp.concatenate([part.astype(jnp.int32).ravel() for part in parts])


class StepUnderWay(NamedTuple):
    """A step that was dispatched.

    Attributes:
        answer, tables: of ``packed_step``.
        shape: what it was compiled for.
        num_rows: rows of the batch that are no padding, the first ones.
    """

    answer: jax.Array
    tables: jax.Array
    shape: StepShape
    num_rows: int

    def result(self) -> tuple[AttentionMetadata, Extended]:
        """Wait for it; all arrays are numpy's, views of what came back."""
        shape, at = self.shape, self.shape.outputs()
        answer = np.asarray(self.answer)
        num_new, num_evicted, num_copies = answer[at["totals"]].tolist()
        ok = answer[at["ok"]] != 0
        slots = answer[at["slot_mapping"]]
        arrays: dict[str, Any] = {
            "block_tables": np.asarray(self.tables),
            "kv_lens": answer[at["kv_lens"]],
            "query_start_loc": None if shape.num_tokens is None else answer[at["query_start_loc"]],
            "slot_mapping": slots if shape.num_groups == 1 else slots.reshape(shape.num_groups, -1),
            "positions": answer[at["positions"]],
            "ok": ok,
        }
        meta = AttentionMetadata(
            **arrays,
            max_query_len=1 if shape.num_tokens is None else shape.num_tokens,
            max_kv_len=shape.max_tokens_per_req,
        )
        done = Extended(
            ok[: self.num_rows],
            _named(answer[at["new_ids"]], num_new),
            _named(answer[at["evicted_ids"]], num_evicted),
            (_named(answer[at["copy_src"]], num_copies), _named(answer[at["copy_dst"]], num_copies)),
        )
        return meta, done


def _named(ids: np.ndarray, number: int) -> np.ndarray:
    return ids[ids >= 0] if number else _NONE


@lru_cache(maxsize=1024)
def _inputs(shape: StepShape) -> dict[str, slice]:
    size = shape.num_rows
    freed = shape.num_requests if shape.free_capacity else 0
    return _slices(
        {
            "rows": size,
            "counts": size,
            "restored": size,
            "freed": freed,
            "marks": shape.num_marks,
            "used": shape.num_requests * shape.reserves,
            "ahead": size * shape.reserves,
        }
    )


@lru_cache(maxsize=1024)
def _outputs(shape: StepShape) -> dict[str, slice]:
    tokens = shape.num_rows if shape.num_tokens is None else shape.num_tokens
    copied = shape.copies * shape.num_groups * shape.num_rows
    return _slices(
        {
            "totals": 3,
            "ok": shape.num_rows,
            "kv_lens": shape.num_rows,
            "query_start_loc": 0 if shape.num_tokens is None else shape.num_rows + 1,
            "slot_mapping": tokens * shape.num_groups,
            "positions": tokens,
            "new_ids": shape.capacity,
            "evicted_ids": shape.capacity,
            "copy_src": copied,
            "copy_dst": copied,
        }
    )


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    """One after another; "end": empty, behind the last."""
    slices, start = {}, 0
    for name, size in {**sizes, "end": 0}.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices
