"""Attention states of all ranks of a mesh axis, merged on all of them: four reductions, equal in result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from enum import StrEnum

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import merge_attention_states
from pallas_kernels.dispatch import Implementation
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError


class AllReduceStrategy(StrEnum):
    """How attention states of several ranks become one.

    Each is made of the merge of two states, which is associative (FlashInfer, arXiv 2501.01005), so only who sends
    what to whom is different. In bytes sent by each of n ranks, for a state of S bytes (float32, one LSE a head
    beside its output):

    - ``NCCL``: XLA's own all-reduce, twice: the highest LSE, then the weighted sums. What it sends is XLA's affair.
    - ``RING``: reduce-scatter and all-gather round the ring: 2(n - 1) sends of S / n. Best for large states.
    - ``TREE``: recursive doubling, partner ``rank ^ 2**k``: log2(n) sends of S. Best for small ones.
    - ``RECURSIVE``: halving and doubling (Thakur, Rabenseifner, Gropp 2005): log2(n) sends of S/2, S/4, ..., then the
      same backwards: 2S(n - 1) / n in 2 log2(n) sends.

    Where n is no power of two, TREE and RECURSIVE fold the ranks in excess into others first and hand them the result
    at the end: two sends of S more.
    """

    NCCL = "nccl"
    RING = "ring"
    TREE = "tree"
    RECURSIVE = "recursive"


def all_reduce_states(
    out: jax.Array,
    lse: jax.Array,
    axis_name: Hashable,
    axis_size: int,
    strategy: AllReduceStrategy | str = AllReduceStrategy.NCCL,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Inside ``jax.shard_map``: merge the ranks' attentions of the same queries over disjoint keys.

    The result is that of ``pallas_kernels.merge_attention_states`` over the states of all ranks. RING, TREE and
    RECURSIVE give every rank the same bits: a piece is merged on one rank only and copied from there, or by two
    ranks from the same two operands in the same order. NCCL gives what XLA's all-reduce gives; that is the same
    bits too on CPU and with NCCL.

    Args:
        out: floating [..., heads, d]; anything, NaN included, where ``lse`` is -inf.
        lse: float32 [..., heads], natural log; -inf: saw no key. NaN and +inf count as -inf.
        axis_name: of the mesh axis.
        axis_size: static, ranks on that axis.
        strategy: static.
        implementation: of the merge, see ``merge_attention_states``.

    Returns:
        (out of the dtype it came in, lse f32), on every rank. Computed, and sent, in float32. Where no rank saw a
        key: 0 and -inf. On one rank: its own state, with 0 where it saw nothing.

    Raises:
        InvalidArgumentError: no such strategy; no such axis here, or of another size.
        ShapeMismatchError: shapes or dtypes that do not fit.
    """
    chosen = _checked_strategy(strategy)
    _check_states(out, lse)
    check_axis(axis_name, axis_size)
    merge = _Merge(axis_name, axis_size, implementation)
    own = merge_attention_states(out[None].astype(jnp.float32), lse[None], implementation=implementation)
    if axis_size == 1 or not lse.size:
        merged = own
    elif chosen is AllReduceStrategy.NCCL:
        merged = _sum_weighted(*own, axis_name)
    else:
        merged = _REDUCTIONS[chosen](merge, *own)
    return merged[0].astype(out.dtype), merged[1]


def check_axis(axis_name: Hashable, axis_size: int) -> None:
    """Raise ``InvalidArgumentError`` unless the mesh around has this axis, and it is of this size."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise InvalidArgumentError(
            f"axis_name: got {axis_name!r}, want an axis of the mesh of the shard_map around this call"
        ) from None
    if size != axis_size:
        raise InvalidArgumentError(f"axis_size: got {axis_size!r}, want {size}, the size of axis {axis_name!r}")


def _checked_strategy(strategy: str) -> AllReduceStrategy:
    if strategy not in list(AllReduceStrategy):
        known = [kind.value for kind in AllReduceStrategy]
        raise InvalidArgumentError(f"strategy: got {strategy!r}, want one of {known}")
    return AllReduceStrategy(strategy)


def _check_states(out: jax.Array, lse: jax.Array) -> None:
    if out.ndim < 2 or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ShapeMismatchError(f"out: got {out.dtype}{list(out.shape)}, want floating [..., heads, d]")
    if lse.shape != out.shape[:-1] or lse.dtype != jnp.float32:
        raise ShapeMismatchError(
            f"lse: got {lse.dtype}{list(lse.shape)}, want float32{list(out.shape[:-1])}, out without its last dimension"
        )


def _sum_weighted(out: jax.Array, lse: jax.Array, axis_name: Hashable) -> tuple[jax.Array, jax.Array]:
    """The merge as two all-reduces: of the LSEs' maximum, and of weighted outputs and weights side by side."""
    highest = lax.pmax(lse, axis_name)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)  # exp(-inf - -inf) is NaN
    weight = jnp.exp(lse - highest)
    packed = jnp.concatenate([(out * weight[..., None]).ravel(), weight.ravel()])
    summed = lax.psum(packed, axis_name)
    total = summed[out.size :].reshape(lse.shape)
    out = summed[: out.size].reshape(out.shape) / jnp.where(total > 0, total, 1)[..., None]
    return out, highest + jnp.log(total)


@dataclasses.dataclass(frozen=True)
class _Merge:
    """States on the wire, and their merge.

    A packed state f32[pieces, rows * (d + 1)] has in each piece the outputs of its rows, then their LSEs: flat, so that
    one collective carries both and no accelerator pads d + 1 to a tile.
    """

    axis_name: Hashable
    axis_size: int
    implementation: Implementation

    @property
    def rank(self) -> jax.Array:
        """i32[]: this rank."""
        return lax.axis_index(self.axis_name)

    def send(self, packed: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        """What the ranks in ``pairs`` of (from, to) send; zeros on a rank that nobody sends to."""
        return lax.ppermute(packed, self.axis_name, pairs)

    def __call__(self, a: jax.Array, b: jax.Array, d: int) -> jax.Array:
        """Two packed states as one."""
        states = [unpack(state, d) for state in (a, b)]
        outs, lses = (jnp.stack(parts) for parts in zip(*states, strict=True))
        return pack(*merge_attention_states(outs, lses, implementation=self.implementation))

    def exchanged(self, mine: jax.Array, theirs: jax.Array, is_lower: jax.Array, d: int) -> jax.Array:
        """``mine`` and a partner's, the lower rank's first on both.

        A sum of two products is a multiply-add to many compilers, which rounds one of them and not the other: only
        with the same operands in the same places do both partners get the same bits.
        """
        return self(jnp.where(is_lower, mine, theirs), jnp.where(is_lower, theirs, mine), d)


def pack(out: jax.Array, lse: jax.Array) -> jax.Array:
    """Out f32[pieces, rows, d] and lse f32[pieces, rows] as f32[pieces, rows * (d + 1)]."""
    return jnp.concatenate([out.reshape(len(out), -1), lse], axis=1)


def unpack(packed: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """The same backwards."""
    rows = packed.shape[1] // (d + 1)
    return packed[:, : rows * d].reshape(-1, rows, d), packed[:, rows * d :]


_Reduction = Callable[[_Merge, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _in_pieces(
    out: jax.Array, lse: jax.Array, pieces: int, reduce: Callable[[jax.Array, int], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """``reduce`` of the packed state in equal ``pieces``, padded with states that saw nothing."""
    d, rows = out.shape[-1], lse.size
    missing = -rows % pieces
    flat_out = jnp.pad(out.reshape(rows, d), ((0, missing), (0, 0)))
    flat_lse = jnp.pad(lse.ravel(), (0, missing), constant_values=-jnp.inf)
    packed = reduce(pack(flat_out.reshape(pieces, -1, d), flat_lse.reshape(pieces, -1)), d)
    flat_out, flat_lse = unpack(packed, d)
    return flat_out.reshape(-1, d)[:rows].reshape(out.shape), flat_lse.ravel()[:rows].reshape(lse.shape)


def _ring(merge: _Merge, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each of n pieces goes round once and is merged on the way, and round once more to be copied."""
    n, rank = merge.axis_size, merge.rank
    onwards = [(i, (i + 1) % n) for i in range(n)]

    def reduce(pieces: jax.Array, d: int) -> jax.Array:
        moving = lax.dynamic_slice_in_dim(pieces, rank, 1)
        for step in range(1, n):
            own = lax.dynamic_slice_in_dim(pieces, (rank - step) % n, 1)
            moving = merge(merge.send(moving, onwards), own, d)
        for step in range(n):  # piece rank + 1 is complete here
            if step:
                moving = merge.send(moving, onwards)
            pieces = lax.dynamic_update_slice_in_dim(pieces, moving, (rank + 1 - step) % n, 0)
        return pieces

    return _in_pieces(out, lse, n, reduce)


def _tree(merge: _Merge, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Recursive doubling: after step k, groups of 2**(k + 1) ranks hold the same."""

    def reduce(state: jax.Array, d: int) -> jax.Array:
        power, rank = _power_of_two_within(merge.axis_size), merge.rank
        state = _fold_in(merge, state, d)
        for distance in _doubling(power):
            theirs = merge.send(state, [(i, i ^ distance) for i in range(power)])
            state = merge.exchanged(state, theirs, rank & distance == 0, d)
        return _fold_out(merge, state)

    return _in_pieces(out, lse, 1, reduce)


def _recursive(merge: _Merge, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Halving: of the pieces two partners both have, each sends half and merges the other. Doubling gives them back."""
    power, rank = _power_of_two_within(merge.axis_size), merge.rank

    def reduce(pieces: jax.Array, d: int) -> jax.Array:
        pieces = _fold_in(merge, pieces, d)
        for distance in reversed(_doubling(power)):
            half, is_lower = len(pieces) // 2, rank & distance == 0
            keeps, gives = (jnp.where(is_lower, first, half - first) for first in (0, half))
            theirs = merge.send(
                lax.dynamic_slice_in_dim(pieces, gives, half), [(i, i ^ distance) for i in range(power)]
            )
            pieces = merge.exchanged(lax.dynamic_slice_in_dim(pieces, keeps, half), theirs, is_lower, d)
        for distance in _doubling(power):
            theirs, is_lower = merge.send(pieces, [(i, i ^ distance) for i in range(power)]), rank & distance == 0
            both = jnp.where(is_lower, pieces, theirs), jnp.where(is_lower, theirs, pieces)
            pieces = jnp.concatenate(both)
        return _fold_out(merge, pieces)

    return _in_pieces(out, lse, power, reduce)


_REDUCTIONS: dict[AllReduceStrategy, _Reduction] = {
    AllReduceStrategy.RING: _ring,
    AllReduceStrategy.TREE: _tree,
    AllReduceStrategy.RECURSIVE: _recursive,
}


def _power_of_two_within(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _doubling(power: int) -> list[int]:
    """1, 2, 4, ... below ``power``."""
    return [1 << k for k in range(power.bit_length() - 1)]


def _fold_in(merge: _Merge, state: jax.Array, d: int) -> jax.Array:
    """Ranks 0 to p - 1, p the greatest power of two within n, hold everything: rank p + i has merged into rank i."""
    power = _power_of_two_within(merge.axis_size)
    excess = merge.axis_size - power
    if not excess:
        return state
    folded = merge.send(state, [(power + i, i) for i in range(excess)])
    return jnp.where(merge.rank < excess, merge(state, folded, d), state)


def _fold_out(merge: _Merge, state: jax.Array) -> jax.Array:
    """Rank p + i is told what rank i has."""
    power = _power_of_two_within(merge.axis_size)
    excess = merge.axis_size - power
    if not excess:
        return state
    return jnp.where(merge.rank < power, state, merge.send(state, [(i, power + i) for i in range(excess)]))
