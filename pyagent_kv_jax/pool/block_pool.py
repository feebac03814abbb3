"""Which block is whose: reference counts, cached content, and the queues of free blocks, in one small pytree."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integers, is_count
from pyagent_kv_jax.errors import (
    ConfigError,
    DoubleFreeError,
    InvalidBlockError,
    KVCacheError,
    ShapeMismatchError,
    is_concrete,
)
from pyagent_kv_jax.pool import admission, queues
from pyagent_kv_jax.pool.admission import Admission, checked_capacity
from pyagent_kv_jax.pool.pool_display import pool_html, pool_line
from pyagent_kv_jax.pool.queues import Counters, Queues
from pyagent_kv_jax.tables.in_place import after


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ref_counts", "cached", "position", "queue", "counters"],
    meta_fields=["num_blocks"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class BlockPool:
    """N blocks. Immutable: each change returns a new pool; inside a donated ``jit`` it is made in place.

    Every operation serves a whole batch and, but for ``take``, costs the same at any N. A refused operation changes
    nothing, and its ``ok`` says so. Called with plain values, all but ``admit`` and ``allocate`` raise instead.

    Attributes:
        ref_counts: i32[N], references to each block; 0: free.
        cached: bool[N], whether the block has cached content.
        position: i32[N], where in ``queue`` a free block stands.
        queue: i32[4N], the free blocks (see ``queues.py``).
        counters: i32[7], see ``queues.Counters``.
        num_blocks: N, static.
    """

    ref_counts: jax.Array
    cached: jax.Array
    position: jax.Array
    queue: jax.Array
    counters: jax.Array
    num_blocks: int

    def __repr__(self) -> str:
        return pool_line(self)

    def _repr_html_(self) -> str:
        return pool_html(self)

    @classmethod
    def create(cls, num_blocks: int) -> Self:
        """A pool of free blocks without content, to be given out from 0 on.

        Raises:
            ConfigError: not a count of blocks (1 to 2**28 - 1, so that queue indices fit int32).
        """
        if not is_count(num_blocks) or not 0 < num_blocks < 2**28:
            raise ConfigError(f"num_blocks: got {num_blocks!r}, want an integer from 1 to {2**28 - 1}")
        num_blocks = int(num_blocks)
        blocks = jnp.arange(num_blocks, dtype=jnp.int32)
        return cls(
            ref_counts=jnp.zeros(num_blocks, jnp.int32),
            cached=jnp.zeros(num_blocks, bool),
            position=blocks,
            queue=jnp.concatenate([blocks, jnp.full(3 * num_blocks, -1, jnp.int32)]),
            counters=jnp.zeros(len(Counters._fields), jnp.int32).at[1].set(num_blocks),
            num_blocks=num_blocks,
        )

    @classmethod
    def with_references(cls, ref_counts: np.ndarray) -> Self:
        """A pool whose blocks have ``ref_counts`` i32[N] references; the free ones to be given out from the lowest on.

        On the host, with plain values; costs O(N), and no compilation.

        Raises:
            InvalidBlockError: a negative count.
            ConfigError: as ``create``.
        """
        counts = np.asarray(ref_counts, np.int32)
        if (counts < 0).any():
            raise InvalidBlockError(f"ref_counts: got {counts[counts < 0][:5].tolist()}, want 0 or more")
        free = np.flatnonzero(counts == 0).astype(np.int32)
        position, queue = np.zeros(len(counts), np.int32), np.full(4 * len(counts), -1, np.int32)
        position[free], queue[: len(free)] = np.arange(len(free)), free
        return dataclasses.replace(
            pool := cls.create(len(counts)),
            ref_counts=jnp.asarray(counts),
            position=jnp.asarray(position),
            queue=jnp.asarray(queue),
            counters=pool.counters.at[Counters._fields.index("num_uncached")].set(len(free)),
        )

    @property
    def num_free(self) -> jax.Array:
        """i32[]: free blocks, with and without cached content."""
        return Counters.of(self.counters).num_free

    @property
    def num_cached_free(self) -> jax.Array:
        """i32[]: free blocks with cached content."""
        return Counters.of(self.counters).num_cached

    def admit(
        self,
        counts: ArrayLike,
        *,
        capacity: int,
        hits: ArrayLike | None = None,
        hit_offsets: ArrayLike | None = None,
        order: ArrayLike | None = None,
    ) -> tuple[Self, Admission]:
        """Give each of R rows one more reference to its hits, and ``counts`` new blocks: all of it or nothing.

        Rows are served in ``order``. A row costs its new blocks and the free blocks it is first to revive. Once a row
        does not fit (into the free blocks, or its ids into what is left of ``capacity``), later ones that want blocks
        are refused too. A row that wants nothing is ok. No hit of a served row is evicted for another row.

        Args:
            counts: i32[R], new blocks. A row with a negative count is refused by itself.
            capacity: static; the most ids given in all, hits included.
            hits: i32[H]; row r's hits, in any number of repeats, are ``hits[hit_offsets[r] : hit_offsets[r + 1]]``.
                A row that hits an id outside the pool, or a free block with no content, is refused by itself.
            hit_offsets: i32[R + 1].
            order: i32[R], row indices in the order of service; None: 0 to R - 1. If some row is missing, all rows
                are refused that want blocks.

        Raises:
            ShapeMismatchError: arrays that do not fit each other, or not of integers.
            InvalidArgumentError: a ``capacity`` so large that sums over the rows could pass int32.
        """
        wanted = integers("counts", counts)
        if (hits is None) != (hit_offsets is None):
            raise ShapeMismatchError("hits and hit_offsets: got one of them, want both or neither")
        rows = wanted.shape[0]
        lookup = None
        if hits is not None and hit_offsets is not None:
            lookup = integers("hits", hits), integers("hit_offsets", hit_offsets, rows + 1)
            lookup = None if lookup[0].shape[0] == 0 else lookup
        order = None if order is None else integers("order", order, rows)
        capacity = checked_capacity(capacity, rows, 0 if lookup is None else lookup[0].shape[0])
        return _admit(self, wanted, lookup, order, capacity)

    def allocate(self, counts: ArrayLike, *, capacity: int) -> tuple[Self, Admission]:
        """``admit`` without hits: ``counts`` i32[R] new blocks for each row."""
        return self.admit(counts, capacity=capacity)

    def share(self, ids: ArrayLike) -> tuple[Self, jax.Array]:
        """One more reference to each block in ``ids`` i32[n] (padding -1): blocks in use, or free ones with content.

        Returns:
            (pool, ok bool[]).

        Raises:
            InvalidBlockError: another id; nothing is shared then.
        """
        pool, ok = _share(self, integers("ids", ids))
        return pool, self._checked(ok, InvalidBlockError, "ids", ids, "blocks in use, or free blocks with content")

    def take(self, ids: ArrayLike) -> tuple[Self, jax.Array]:
        """One more reference to each of these very blocks ``ids`` i32[n] (padding -1), in use or free: all or none.

        A free block leaves its queue; what content it has cached it keeps: whoever takes it as new memory calls
        ``uncache`` first. An id named twice gets two references. Costs O(N), unlike everything else here.

        Returns:
            (pool, ok bool[]); false, and nothing is changed, when an id is outside the pool.

        Raises:
            InvalidBlockError: the same.
        """
        pool, ok = _take(self, integers("ids", ids))
        return pool, self._checked(ok, InvalidBlockError, "ids", ids, f"ids in [0, {self.num_blocks})")

    def free(self, ids: ArrayLike) -> tuple[Self, jax.Array]:
        """Drop one reference to each block in ``ids`` i32[n] (padding -1), in their order.

        A block nobody refers to any more joins the queue of its kind, at the last place it has in ``ids``.

        Returns:
            (pool, ok bool[]); false, and nothing is changed, when a block has fewer references than are dropped, or
            an id is outside the pool.

        Raises:
            DoubleFreeError: the same.
        """
        pool, ok = _free(self, integers("ids", ids))
        return pool, self._checked(ok, DoubleFreeError, "ids", ids, "blocks with as many references as are dropped")

    def mark_cached(self, ids: ArrayLike) -> tuple[Self, jax.Array]:
        """Note that the blocks in use ``ids`` i32[n] (padding -1) have content worth keeping when they are free.

        Returns:
            (pool, ok bool[]); false, and nothing is changed, when one is free or outside the pool.

        Raises:
            InvalidBlockError: the same.
        """
        pool, ok = _mark_cached(self, integers("ids", ids))
        return pool, self._checked(ok, InvalidBlockError, "ids", ids, "blocks in use")

    def uncache(self, ids: ArrayLike) -> tuple[Self, jax.Array]:
        """Forget the content of the blocks ``ids`` i32[n] (padding -1). A free one goes to the tail of the queue of
        blocks without content; a block that has none stays as it is.

        Returns:
            (pool, ok bool[]); false, and nothing is changed, when an id is outside the pool.

        Raises:
            InvalidBlockError: the same.
        """
        pool, ok = _uncache(self, integers("ids", ids))
        return pool, self._checked(ok, InvalidBlockError, "ids", ids, f"ids in [0, {self.num_blocks})")

    def _checked(self, ok: jax.Array, error: type[KVCacheError], name: str, ids: Any, wanted: str) -> jax.Array:
        # Traced, the caller has ``ok``. A checkify check here would cost it jit's fast dispatch, 30 us and more a call.
        if is_concrete(ok) and not ok:
            shown = np.asarray(ids).tolist()
            more = f" ... ({len(shown)} in all)" if len(shown) > 20 else ""
            raise error(f"{name}: got {shown[:20]}{more}, want {wanted}, in a pool of {self.num_blocks}")
        return ok

    def _queues(self) -> Queues:
        return Queues(self.queue, self.position, Counters.of(self.counters))

    def _with(self, queued: Queues, ref_counts: jax.Array, cached: jax.Array) -> Self:
        return dataclasses.replace(
            self,
            ref_counts=ref_counts,
            cached=cached,
            position=queued.position,
            queue=queued.queue,
            counters=queued.at.stack(),
        )


def _places_of(pool: BlockPool, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(named bool[n], block i32[n] with N for what is not named, inside bool[]: nothing but padding is outside)."""
    named = (ids >= 0) & (ids < pool.num_blocks)
    return named, jnp.where(named, ids, pool.num_blocks), jnp.all(named | (ids == -1))


@partial(jax.jit, static_argnums=4)
def _admit(
    pool: BlockPool,
    counts: jax.Array,
    lookup: tuple[jax.Array, jax.Array] | None,
    order: jax.Array | None,
    capacity: int,
) -> tuple[BlockPool, Admission]:
    num_blocks, queued, ref_counts, cached = pool.num_blocks, pool._queues(), pool.ref_counts, pool.cached
    valid = counts >= 0
    length, cost, hits = jnp.clip(counts, 0, capacity + 1), None, None  # more can't be given; sums stay within int32
    if order is not None:
        proper = admission.is_order(order, counts.shape[0])
        order = jnp.where(proper, order, jnp.arange(counts.shape[0], dtype=jnp.int32))
    if lookup is not None:
        hits, ref_counts, cached = admission.look_up_hits(ref_counts, cached, *lookup, valid, order)
        valid &= hits.row_ok
        cost = length.at[hits.row].add(hits.revives.astype(jnp.int32), mode="drop")
        length = length + hits.lengths
    if order is not None:
        valid &= proper | (length == 0)
    ok, offsets = admission.serve(length, cost, valid, queued.at.num_free, capacity, order)

    num_new = offsets[-1]
    if hits is not None:
        served = (hits.row < counts.shape[0]) & ok[jnp.minimum(hits.row, counts.shape[0] - 1)]
        ref_counts = ref_counts.at[jnp.where(served, hits.block, num_blocks)].add(1, mode="drop")
        num_new -= jnp.sum(served, dtype=jnp.int32)
        revived = served & hits.revives
        places = queued.position.at[hits.block].get(mode="fill", fill_value=0)
        queued = queues.remove_cached(queued, places, revived)
        queued = queues.sweep(queued, jnp.sum(revived, dtype=jnp.int32))
    num_uncached = queued.at.num_uncached
    queued, cached, ids = queues.pop(queued, cached, num_new, capacity)
    ref_counts = ref_counts.at[jnp.where(ids < 0, num_blocks, ids)].set(1, mode="drop")
    evicted = (jnp.arange(capacity) >= num_uncached) & (ids >= 0)
    if order is not None or lookup is not None:
        granted = (*lookup, jnp.where(ok, hits.lengths, 0)) if lookup and hits else None
        ids, offsets, evicted = admission.lay_out(ids, num_uncached, jnp.where(ok, counts, 0), order, granted)
    return pool._with(queued, ref_counts=ref_counts, cached=cached), Admission(ids, offsets, ok, evicted)


@jax.jit
def _share(pool: BlockPool, ids: jax.Array) -> tuple[BlockPool, jax.Array]:
    named = ids != -1  # all of them one row's hits, one after another
    place = jnp.cumsum(named, dtype=jnp.int32) - 1
    hits = jnp.full_like(ids, -1).at[jnp.where(named, place, ids.shape[0])].set(ids, mode="drop")
    offsets = jnp.stack([jnp.int32(0), jnp.sum(named, dtype=jnp.int32)])
    pool, admitted = _admit(pool, jnp.zeros(1, jnp.int32), (hits, offsets), None, ids.shape[0])
    return pool, admitted.ok[0]


@jax.jit
def _take(pool: BlockPool, ids: jax.Array) -> tuple[BlockPool, jax.Array]:
    _, block, ok = _places_of(pool, ids)
    ref_counts = pool.ref_counts.at[jnp.where(ok, block, pool.num_blocks)].add(1, mode="drop")
    leaves = (pool.ref_counts == 0) & (ref_counts > 0)
    queued = queues.remove(pool._queues(), leaves, pool.cached)
    return pool._with(queued, ref_counts=ref_counts, cached=pool.cached), ok


@jax.jit
def _free(pool: BlockPool, ids: jax.Array) -> tuple[BlockPool, jax.Array]:
    num_blocks, queued, size = pool.num_blocks, pool._queues(), ids.shape[0]
    named, block, inside = _places_of(pool, ids)
    ref_counts = pool.ref_counts.at[block].add(-1, mode="drop")
    left = ref_counts.at[block].get(mode="fill", fill_value=0)
    ok = inside & jnp.all(left >= 0)
    ref_counts = ref_counts.at[jnp.where(ok, num_blocks, block)].add(1, mode="drop")

    # A block may be named twice; its last entry queues it. ``position`` of a block in use is free for use as scratch:
    # bids above every position it can hold, the highest stays, and whoever finds its own has won.
    entry = 4 * num_blocks + jnp.arange(size, dtype=jnp.int32)
    bids = named & ok
    position = queued.position.at[jnp.where(bids, block, num_blocks)].max(entry, mode="drop")
    last = bids & (position.at[block].get(mode="fill", fill_value=0) == entry)
    joins = last & (left == 0)
    is_cached = pool.cached.at[block].get(mode="fill", fill_value=False)
    queued, index = queues.push(queued, ids, joins, is_cached)
    place = jnp.where(joins, index, 0)
    position = position.at[jnp.where(last, block, num_blocks)].set(place, mode="drop")
    queued = queues.sweep(queued._replace(position=position), jnp.sum(joins & is_cached, dtype=jnp.int32))
    return pool._with(queued, ref_counts=ref_counts, cached=after(pool.cached, is_cached)), ok


@jax.jit
def _mark_cached(pool: BlockPool, ids: jax.Array) -> tuple[BlockPool, jax.Array]:
    named, block, inside = _places_of(pool, ids)
    held = pool.ref_counts.at[block].get(mode="fill", fill_value=0)
    ok = inside & jnp.all((held > 0) | ~named)
    cached = pool.cached.at[jnp.where(ok, block, pool.num_blocks)].set(True, mode="drop")
    return dataclasses.replace(pool, ref_counts=after(pool.ref_counts, held), cached=cached), ok


@jax.jit
def _uncache(pool: BlockPool, ids: jax.Array) -> tuple[BlockPool, jax.Array]:
    num_blocks, queued, size = pool.num_blocks, pool._queues(), ids.shape[0]
    named, block, ok = _places_of(pool, ids)
    held = pool.ref_counts.at[block].get(mode="fill", fill_value=0)
    is_cached = pool.cached.at[block].get(mode="fill", fill_value=False)
    place = queued.position.at[block].get(mode="fill", fill_value=0)
    # The first entry of a block moves it: negative bids in ``position``, the lowest stays.
    moves = named & ok & is_cached & (held == 0) & (place >= 0)
    bid = jnp.arange(size, dtype=jnp.int32) - size
    position = queued.position.at[jnp.where(moves, block, num_blocks)].min(bid, mode="drop")
    moves &= position.at[block].get(mode="fill", fill_value=0) == bid
    queued = queues.remove_cached(queued, place, moves)
    queued, index = queues.push(queued, ids, moves, jnp.zeros(size, bool))
    position = position.at[jnp.where(moves, block, num_blocks)].set(index, mode="drop")
    queued = queues.sweep(queued._replace(position=position), jnp.sum(moves, dtype=jnp.int32))
    cached = pool.cached.at[jnp.where(ok & is_cached, block, num_blocks)].set(False, mode="drop")
    return pool._with(queued, ref_counts=after(pool.ref_counts, held), cached=cached), ok
