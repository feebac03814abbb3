"""Which free blocks a row gets: the policies of ``BlockAllocationStrategy`` over one pool, chosen call by call."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import as_int32, integers, is_count
from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, OutOfBlocksError, is_concrete
from pyagent_kv_jax.pool import queues
from pyagent_kv_jax.pool.admission import Admission, checked_capacity, serve
from pyagent_kv_jax.pool.block_pool import BlockPool
from pyagent_kv_jax.tables.ragged import offsets_from_lengths, rows_of_entries

_Serving = tuple[jax.Array, jax.Array, jax.Array]  # kinds i8[N], ids that can still be given, nobody refused yet

_IN_USE, _EMPTY, _CACHED = 0, 1, 2  # what a block is to a search for runs: free without content, free with


def allocate_blocks(
    pool: BlockPool,
    counts: ArrayLike,
    *,
    capacity: int,
    strategy: BlockAllocationStrategy = BlockAllocationStrategy.SCATTERED,
    node: Any = None,
    num_nodes: int = 1,
) -> tuple[BlockPool, Admission]:
    """``counts`` i32[R] new blocks for each row, or nothing, as ``BlockPool.allocate``, but which ones is ``strategy``.

    Under every strategy rows are served in order, and once one does not fit, later ones that want blocks are refused
    too. CONTIGUOUS and NUMA_AWARE cost O(N), CONTIGUOUS that much for each row: they are not for every decode step.

    - ``SCATTERED``: ``pool.allocate``.
    - ``CONTIGUOUS``: one run of consecutive ids, ascending, a row. The shortest stretch of free blocks without content
      that is long enough (of equal ones the first), from its beginning; where there is none, the shortest of all free
      blocks, and the cached content in the way is given up.
    - ``NUMA_AWARE``: blocks are spread over ``num_nodes`` nodes in equal ranges of ids (``node_of_block``). A row gets
      blocks of its ``node``, in the pool's own order, and what is missing from the others. No row is given another
      node's blocks before every row has had those of its own. Node 0's cached blocks go before node 1's empty ones.
    - ``PREDICTIVE``: refused. To reserve ahead takes what a pool does not know: who grows, and how fast. That is
      ``PredictiveBlockAllocator``'s, which asks the pool for blocks under one of the others.

    Args:
        pool: N blocks.
        counts: i32[R]; a row with a negative count is refused by itself.
        capacity: static; the most ids given in all.
        strategy: static.
        node: for NUMA_AWARE only: i32[], or i32[R] for each row. Traced: a row with no such node is refused by itself.
        num_nodes: static; divides N.

    Returns:
        (pool, admission). A refused row, and only that, changes nothing: see ``require_allocated``.

    Raises:
        InvalidArgumentError: a strategy, node or capacity that cannot be; a node with a strategy that knows none.
        ConfigError: ``num_nodes`` does not divide N.
        ShapeMismatchError: counts or nodes that are not int32[R].
    """
    strategy = _strategy(strategy)
    if (node is None) == (strategy is BlockAllocationStrategy.NUMA_AWARE):
        raise InvalidArgumentError(f"node: got {node!r} with {strategy.value!r}, want one with 'numa_aware' only")
    wanted = integers("counts", counts)
    rows = wanted.shape[0]
    capacity = checked_capacity(capacity, rows)
    if strategy is BlockAllocationStrategy.SCATTERED or not rows:
        return pool.allocate(wanted, capacity=capacity)
    if strategy is BlockAllocationStrategy.CONTIGUOUS:
        return _allocate_runs(pool, wanted, capacity)
    require_nodes(pool.num_blocks, num_nodes)
    broadcast: Any = jnp.broadcast_to if isinstance(node, jax.Array) else np.broadcast_to
    nodes = integers("node", node if np.ndim(node) else broadcast(node, rows), rows)
    if is_concrete(nodes) and not np.all((np.asarray(nodes) >= 0) & (np.asarray(nodes) < num_nodes)):
        raise InvalidArgumentError(f"node: got {np.asarray(nodes).tolist()}, want 0 to {num_nodes - 1}")
    return _allocate_near(pool, wanted, nodes, capacity, num_nodes)


def require_allocated(
    pool: BlockPool,
    counts: ArrayLike,
    admission: Admission,
    strategy: BlockAllocationStrategy = BlockAllocationStrategy.SCATTERED,
) -> None:
    """Raise unless every row was served. With plain values only.

    Args:
        pool: the pool that came with ``admission``.
        counts: i32[R], what was asked for.
        admission: what was given.
        strategy: under which.

    Raises:
        OutOfBlocksError: a row was refused. It says how many blocks the first such row wanted, how many were free when
            its turn came, and, with CONTIGUOUS, how long the longest run of them was.
        InvalidArgumentError: the first refused row has a negative count.
    """
    refused = np.flatnonzero(~np.asarray(admission.ok))
    if not len(refused):
        return
    row, count, most = refused[0], int(np.asarray(counts)[refused[0]]), int(pool.num_free)
    if count < 0:
        raise InvalidArgumentError(f"row {row}: got a request for {count} blocks, want 0 or more")
    wanted, within = "blocks", f"the {most} free"
    if strategy == BlockAllocationStrategy.CONTIGUOUS:
        most, wanted = int(longest_free_run(pool)), "consecutive blocks"
        within = f"{most}, the longest run of {within} blocks"
    if count <= most:
        within += f", and at most {len(admission.ids)} ids for all rows"
    raise OutOfBlocksError(f"row {row}: got a request for {count} {wanted}, want at most {within}")


@jax.jit
def longest_free_run(pool: BlockPool) -> jax.Array:
    """i32[]: the most consecutive ids of free blocks, with content and without: what CONTIGUOUS can give. O(N)."""
    return jnp.max(_run_lengths(pool.ref_counts == 0))


def require_nodes(num_blocks: int, num_nodes: int) -> None:
    """Raise ``ConfigError`` unless ``num_nodes`` nodes can hold equal shares of ``num_blocks`` blocks."""
    if not is_count(num_nodes) or num_nodes < 1 or num_blocks % num_nodes:
        raise ConfigError(f"num_nodes: got {num_nodes!r}, want a positive integer that divides {num_blocks} blocks")


def node_of_block(ids: ArrayLike, num_blocks: int, num_nodes: int) -> jax.Array:
    """i32[...] -> i32[...]: the node that holds each block, where equal ranges of ids lie on one node after another.

    -1 for ids outside the pool, padding included.

    Raises:
        ConfigError: ``num_nodes`` is no positive integer that divides ``num_blocks``.
        ShapeMismatchError: ids that are not integers.
        InvalidArgumentError: one that is no int32.
    """
    require_nodes(num_blocks, num_nodes)
    block = jnp.asarray(as_int32("ids", ids if isinstance(ids, jax.Array) else np.asarray(ids), "int32[...]"))
    return jnp.where((block >= 0) & (block < num_blocks), block // (num_blocks // num_nodes), -1)


def _strategy(strategy: str) -> BlockAllocationStrategy:
    known = BlockAllocationStrategy
    if strategy == known.PREDICTIVE:
        raise InvalidArgumentError(
            "strategy: got 'predictive', want 'scattered', 'contiguous' or 'numa_aware': a pool cannot reserve ahead, "
            "PredictiveBlockAllocator does"
        )
    if strategy not in list(known):
        raise InvalidArgumentError(f"strategy: got {strategy!r}, want one of {[kind.value for kind in known]}")
    return known(strategy)


@partial(jax.jit, static_argnums=2)
def _allocate_runs(pool: BlockPool, counts: jax.Array, capacity: int) -> tuple[BlockPool, Admission]:
    index = jnp.arange(pool.num_blocks, dtype=jnp.int32)
    kinds = jnp.where(pool.ref_counts > 0, _IN_USE, jnp.where(pool.cached, _CACHED, _EMPTY)).astype(jnp.int8)
    length = jnp.clip(counts, 0, capacity + 1)  # more can't be given

    def serve_row(carry: _Serving, length: jax.Array) -> tuple[_Serving, tuple[jax.Array, jax.Array]]:
        kinds, room, serving = carry
        empty, is_empty = _shortest_run(kinds == _EMPTY, length)
        any_kind, is_free = _shortest_run(kinds != _IN_USE, length)
        first = jnp.where(is_empty, empty, any_kind)
        gets = serving & (length > 0) & is_free & (length <= room)
        taken = gets & (index >= first) & (index - first < length)
        carry = jnp.where(taken, _IN_USE, kinds), room - jnp.where(gets, length, 0), serving & (gets | (length == 0))
        return carry, (first, gets)

    start = kinds, jnp.int32(capacity), jnp.bool_(True)
    _, (first, gets) = lax.scan(serve_row, start, length)
    offsets = offsets_from_lengths(jnp.where(gets, length, 0))
    row, within, real = _entries(offsets, capacity)
    ids = jnp.where(real, first[row] + within, -1)
    return _give(pool, ids, offsets, gets | (counts == 0))


def _run_lengths(free: jax.Array) -> jax.Array:
    """bool[N] -> i32[N]: how long the run of ``free`` blocks is that begins here; 0 where none begins."""
    index = jnp.arange(free.shape[0], dtype=jnp.int32)
    end = lax.cummin(jnp.where(free, free.shape[0], index), reverse=True)
    begins = free & ~jnp.roll(free, 1).at[0].set(False)
    return jnp.where(begins, end - index, 0)


def _shortest_run(free: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the shortest run of at least ``length`` i32[] begins, of equals the first; and whether there is one."""
    lengths = _run_lengths(free)
    fits = lengths >= jnp.maximum(length, 1)
    first = jnp.argmin(jnp.where(fits, lengths, free.shape[0] + 1)).astype(jnp.int32)
    return first, fits[first]


@partial(jax.jit, static_argnums=(3, 4))
def _allocate_near(
    pool: BlockPool, counts: jax.Array, nodes: jax.Array, capacity: int, num_nodes: int
) -> tuple[BlockPool, Admission]:
    valid = (counts >= 0) & (nodes >= 0) & (nodes < num_nodes)
    length = jnp.clip(counts, 0, capacity + 1)
    # Another node's blocks serve as well: who is served does not depend on where the blocks are.
    ok, _ = serve(length, None, valid, pool.num_free, capacity, None)
    length, nodes = jnp.where(ok, length, 0), jnp.clip(nodes, 0, num_nodes - 1)

    num_blocks, per_node = pool.num_blocks, pool.num_blocks // num_nodes
    free = queues.in_order(pool._queues())
    node_of = jnp.where(free >= 0, free // per_node, num_nodes)
    num_free = jnp.zeros(num_nodes, jnp.int32).at[node_of].add(1, mode="drop")
    rank = _ranks(node_of, num_nodes)
    # Node after node, each in the pool's order.
    by_node = jnp.full_like(free, -1)
    by_node = by_node.at[jnp.where(free >= 0, node_of * per_node + rank, num_blocks)].set(free, mode="drop")

    wants = jnp.where(nodes[:, None] == jnp.arange(num_nodes), length[:, None], 0)  # [R, nodes]
    before = (jnp.cumsum(wants, axis=0, dtype=jnp.int32) - wants)[jnp.arange(len(nodes)), nodes]
    near = jnp.clip(num_free[nodes] - before, 0, length)

    # What is left when every row has had what its node has, in the pool's order.
    had = jnp.append(jnp.minimum(num_free, jnp.sum(wants, axis=0)), num_blocks)
    left = (free >= 0) & (rank >= had[node_of])
    rest = jnp.full_like(free, -1)
    rest = rest.at[jnp.where(left, jnp.cumsum(left) - 1, num_blocks)].set(free, mode="drop")

    offsets = offsets_from_lengths(length)
    row, within, real = _entries(offsets, capacity)
    far_before = offsets_from_lengths(length - near)[:-1]
    at_node = by_node.at[nodes[row] * per_node + before[row] + within].get(mode="clip")
    elsewhere = rest.at[far_before[row] + within - near[row]].get(mode="clip")
    ids = jnp.where(real, jnp.where(within < near[row], at_node, elsewhere), -1)
    return _give(pool, ids, offsets, ok)


def _ranks(kinds: jax.Array, num_kinds: int) -> jax.Array:
    """i32[N]: how many entries of its own kind stand before each one. A pass a kind: a sort takes ten times as long."""

    def rank_kind(ranks: jax.Array, kind: jax.Array) -> tuple[jax.Array, None]:
        mine = kinds == kind
        return jnp.where(mine, jnp.cumsum(mine, dtype=jnp.int32) - 1, ranks), None

    return lax.scan(rank_kind, jnp.zeros_like(kinds), jnp.arange(num_kinds, dtype=jnp.int32))[0]


def _entries(offsets: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each flat entry: its row i32[capacity], its place in the row, and whether there is such an entry."""
    row = rows_of_entries(offsets, capacity)
    real = row < offsets.shape[0] - 1
    row = jnp.minimum(row, offsets.shape[0] - 2)
    return row, jnp.arange(capacity, dtype=jnp.int32) - offsets[row], real


def _give(pool: BlockPool, ids: jax.Array, offsets: jax.Array, ok: jax.Array) -> tuple[BlockPool, Admission]:
    """Free blocks ``ids`` i32[capacity], each named once, as new memory."""
    evicted = (ids >= 0) & pool.cached[jnp.maximum(ids, 0)]
    pool, _ = pool.uncache(jnp.where(evicted, ids, -1))
    pool, _ = pool.take(ids)
    return pool, Admission(ids, offsets, ok, evicted)
