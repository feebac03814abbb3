"""Content that comes from, or goes to, another cache: blocks held for nobody's request, named by their keys.

A hold is a row of the tables, so the pool's invariants cover it like any request. Blocks of an import are entered into
the prefix cache only when their content has been written; a request that begins alike is then admitted as after any
other hit.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyagent_kv_jax.cache.grouped_rows import first_column
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.distributed.handoff.block_transfer import read_blocks, write_blocks
from pyagent_kv_jax.errors import InvalidArgumentError, OutOfBlocksError, ShapeMismatchError, UnknownRequestError
from pyagent_kv_jax.manager.admission import token_ids
from pyagent_kv_jax.manager.manager_state import ManagerState
from pyagent_kv_jax.manager.prefix.block_hash import NO_EXTRAS, BlockKeys, CacheExtras
from pyagent_kv_jax.manager.prefix.events import BlockStored
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit
from pyagent_kv_jax.manager.prefix_filling import runs
from pyagent_kv_jax.manager.request_start import NO_LIMIT, Start, hits_of


@dataclasses.dataclass(frozen=True)
class PrefixHold:
    """Blocks of a prefix that nobody can take away until the hold is released.

    A place is a row (group, column) of an i32[n, 2]: the block that a layer group has for one column of the prefix.

    Attributes:
        hold_id: its name, for ``release_hold`` and the calls that read or write it.
        num_tokens: of the prefix, whole blocks.
        num_cached_tokens: so many of them were in the prefix cache when the hold began.
        keys: of each column.
        present: i32[n, 2], places that have their content since then, ascending by column.
        wanted: i32[n, 2], places that wait for theirs, ascending by column; empty but for an import. A group whose
            attention does not reach back to a column wants none there.
    """

    hold_id: str
    num_tokens: int
    num_cached_tokens: int
    keys: tuple[bytes, ...]
    present: np.ndarray
    wanted: np.ndarray


@dataclasses.dataclass
class _OpenHold:
    """What is known of a hold besides the blocks, which its row names.

    Attributes:
        keys: of the prefix.
        written: bool[G, columns], places that have content.
        waiting: bool[G, columns], places that may still be written.
        is_import: whether it can be finished.
    """

    keys: BlockKeys
    written: np.ndarray
    waiting: np.ndarray
    is_import: bool


class BlockHolds:
    """All holds of a manager. Not thread-safe: the manager's lock is above it."""

    def __init__(self, state: ManagerState) -> None:
        self._state = state
        self._numbers = itertools.count()
        self._open: dict[str, _OpenHold] = {}

    def open_ids(self) -> list[str]:
        """Those not released, in the order they came."""
        self._open = {i: hold for i, hold in self._open.items() if i in self._state.rows}  # others: freed as requests
        return list(self._open)

    def check_none_open(self) -> None:
        """Raise ``InvalidArgumentError`` where blocks are held under keys that another block size would not have."""
        if open_ids := self.open_ids():
            raise InvalidArgumentError(f"block size: got a change with {len(open_ids)} holds open, want none")

    def forget_content(self) -> None:
        """What has been written so far is content no more: it can neither be read nor entered into the cache."""
        for hold in self._open.values():
            hold.written[:] = False

    def hold(self, tokens: np.ndarray, extras: CacheExtras) -> PrefixHold:
        """See ``HoldsPrefixes.hold_prefix``."""
        keys = self._keys(tokens, len(tokens), extras)
        hit = self._lookup(keys)
        return self._begin(keys, hit, hit.blocks.shape[1], is_import=False)

    def begin_import(self, tokens: np.ndarray, extras: CacheExtras) -> PrefixHold:
        """See ``HoldsPrefixes.begin_import``."""
        keys = self._keys(tokens, max(len(tokens) - 1, 0), extras)
        return self._begin(keys, self._lookup(keys), len(keys), is_import=True)

    def _keys(self, tokens: np.ndarray, count: int, extras: CacheExtras) -> BlockKeys:
        """Of the full blocks among the first ``count`` tokens."""
        keys = self._state.hasher.start(extras)
        size = self._state.config.block_size
        keys.extend(tokens[: count // size * size])
        return keys

    def _lookup(self, keys: BlockKeys) -> PrefixHit:
        state = self._state
        if not state.options.prefix_caching:
            raise InvalidArgumentError("prefix_caching: got False, want a manager that keeps content for others")
        return state.prefixes.lookup(keys, len(keys) * state.config.block_size)

    def _begin(self, keys: BlockKeys, hit: PrefixHit, num_columns: int, is_import: bool) -> PrefixHold:
        state, size = self._state, self._state.config.block_size
        hold_id = next(name for name in map("handoff:{}".format, self._numbers) if not state.is_known(name))
        (row,) = state.rows.choose([hold_id], [])
        rows, starts = np.array([row], np.int32), {0: Start(hit, hit.num_tokens, NO_LIMIT)}
        counts = np.array([num_columns * size - hit.num_tokens])
        state._lengths_after((hold_id,), rows, starts, counts + hit.num_tokens)
        done = state.control.admit(rows, counts, hits_of(starts, 1))
        if not done.ok[0] and state._give_back_reserve():
            done = state.control.admit(rows, counts, hits_of(starts, 1))
        if not done.ok[0]:
            raise OutOfBlocksError(
                f"import of {num_columns} columns, {hit.blocks.shape[1]} of them here: the others do not fit into "
                f"{state.num_free()} free blocks"
            )
        state._take_in((hold_id,), rows, starts, done)
        cached = np.zeros((len(state.config.groups), num_columns), bool)
        cached[:, : hit.blocks.shape[1]] = hit.blocks >= 0
        wanted = self._wanted(num_columns, hit.blocks.shape[1])
        self._open[hold_id] = _OpenHold(keys, cached, wanted, is_import)
        digests = tuple(keys.digests[:num_columns])
        return PrefixHold(hold_id, num_columns * size, hit.num_tokens, digests, _places(cached), _places(wanted))

    def _wanted(self, num_columns: int, first: int) -> np.ndarray:
        """bool[G, columns]: those from ``first`` on that the next token sees."""
        config = self._state.config
        wanted = np.zeros((len(config.groups), num_columns), bool)
        for group, of_group in enumerate(config.groups):
            seen = int(first_column(of_group, np.int64(num_columns * config.block_size), config.block_size))
            wanted[group, max(first, seen) :] = True
        return wanted

    # -- their blocks --------------------------------------------------------------------------------------------

    def readable(self, hold_id: str, places: ArrayLike) -> np.ndarray:
        """i32[n]: the blocks at ``places``, all of which have content, as they are numbered now."""
        return self._blocks_at(hold_id, places, self._of(hold_id).written, "blocks of the hold that have content")

    def writable(self, hold_id: str, places: ArrayLike) -> np.ndarray:
        """i32[n]: the blocks at ``places``, all of which an import wants, as they are numbered now."""
        return self._blocks_at(hold_id, places, self._of(hold_id).waiting, "blocks that the import wants")

    def arrived(self, hold_id: str, places: ArrayLike) -> None:
        """Content stands at ``places`` from now on."""
        hold, at = self._of(hold_id), tuple(np.asarray(places).T)
        hold.written[at], hold.waiting[at] = True, False

    def _of(self, hold_id: str) -> _OpenHold:
        if hold_id not in self._open or hold_id not in self._state.rows:
            raise UnknownRequestError(f"hold {hold_id!r}: unknown, want one that has not been released")
        return self._open[hold_id]

    def _blocks_at(self, hold_id: str, places: ArrayLike, allowed: np.ndarray, what: str) -> np.ndarray:
        at = np.asarray(places)
        if at.ndim != 2 or at.shape[1] != 2 or at.dtype.kind not in "iu":
            raise ShapeMismatchError(f"places: got {at.dtype}{list(at.shape)}, want int32[n, 2]")
        right = np.all((at >= 0) & (at < allowed.shape), axis=1)
        right[right] = allowed[tuple(at[right].T)]
        if not right.all():
            raise InvalidArgumentError(f"places: got {at[~right][:8].tolist()}, want (group, column) of {what}")
        return self._state.blocks_of_row(self._state.rows.row_of(hold_id))[tuple(at.T)]

    # -- how they end --------------------------------------------------------------------------------------------

    def finish(self, hold_id: str) -> int:
        """See ``HoldsPrefixes.finish_import``."""
        state, hold = self._state, self._of(hold_id)
        if not hold.is_import:
            raise InvalidArgumentError(f"hold {hold_id!r}: is no import under way, want one that begin_import() began")
        hold.is_import, hold.waiting[:] = False, False
        blocks, total = state.blocks_of_row(state.rows.row_of(hold_id)), 0
        for group, columns in enumerate(hold.written):
            for first, end in runs(columns):
                ids = blocks[group, first:end]
                entered = state.prefixes.insert(group, hold.keys, first, ids)  # those cached before are left out
                state._control.mark_cached(entered)
                total += len(entered)
                if state.events.enabled:
                    self._tell_stored(group, hold.keys, first, ids, np.isin(ids, entered))
        return total

    def _tell_stored(self, group: int, keys: BlockKeys, column: int, ids: np.ndarray, stored: np.ndarray) -> None:
        for first, end in runs(stored):
            at = column + first
            digests = tuple(keys.digests[at : column + end])
            parent, adapter = keys.parent_of(at), keys.extras.adapter
            self._state.events.append(BlockStored(group, tuple(ids[first:end].tolist()), digests, parent, adapter))

    def release(self, hold_id: str) -> None:
        """See ``HoldsPrefixes.release_hold``."""
        self._of(hold_id)
        del self._open[hold_id]
        self._state.free((hold_id,))


class HoldsPrefixes:
    """The part of ``KVCacheManager`` that hands content to, and takes it from, other caches.

    Like the step itself, ``read_hold`` and ``write_import`` use the pages: call them between steps, from the thread
    that makes the steps.
    """

    config: KVCacheConfig
    pages: Any
    _lock: threading.RLock
    _holds: BlockHolds

    def hold_prefix(self, tokens: ArrayLike, *, extras: CacheExtras = NO_EXTRAS) -> PrefixHold:
        """Keep what the prefix cache has of ``tokens``, of their full blocks, until ``release_hold``.

        A hold takes one of the ``max_num_reqs`` rows.

        Args:
            tokens: i32[n].
            extras: what else the blocks depend on.

        Raises:
            TooManyRequestsError: no row is left.
            InvalidArgumentError: not integers of at least 0, or a manager without a prefix cache.
        """
        known = token_ids(tokens)
        with self._lock:
            return self._holds.hold(known, extras)

    def begin_import(self, tokens: ArrayLike, *, extras: CacheExtras = NO_EXTRAS) -> PrefixHold:
        """Blocks for the content of a prompt that is to come from elsewhere, on top of what is cached of it.

        All full blocks but one that ends with the last token, which must be computed for its logits. Nobody can hit
        them before ``finish_import``; give them back with ``release_hold``, whether anything came or not.

        Args:
            tokens: i32[n], the whole prompt.
            extras: what else the blocks depend on.

        Raises:
            OutOfBlocksError: they do not fit; nothing has changed.
            TooManyRequestsError, RequestTooLongError: as ``step``.
            InvalidArgumentError: as ``hold_prefix``.
        """
        known = token_ids(tokens)
        with self._lock:
            return self._holds.begin_import(known, extras)

    def read_hold(self, hold_id: str, places: ArrayLike) -> Blocks:
        """Canonical copies (see ``BlockLayout``) of the blocks at ``places`` i32[n, 2] of a hold, on its devices.

        Raises:
            UnknownRequestError: it was released.
            InvalidArgumentError: a place without content.
        """
        with self._lock:
            return read_blocks(self.pages, self._holds.readable(hold_id, places))

    def write_import(self, hold_id: str, places: ArrayLike, blocks: Blocks) -> None:
        """Put canonical ``blocks``, which may be on other devices, at ``places`` i32[n, 2] of an import.

        Raises:
            UnknownRequestError: it was released.
            InvalidArgumentError: a place that it does not want, or that has been written; or the import is finished.
            InvalidBlockError: a place named twice.
            ShapeMismatchError: blocks of another geometry.
        """
        with self._lock:
            self.pages = write_blocks(self.pages, self._holds.writable(hold_id, places), blocks)
            self._holds.arrived(hold_id, places)

    def finish_import(self, hold_id: str) -> int:
        """Enter into the prefix cache what has arrived of an import; it is held until ``release_hold``.

        Returns:
            Blocks that can be hit from now on: those for which no other block had the key already.

        Raises:
            UnknownRequestError: it was released.
            InvalidArgumentError: it is no import, or was finished before.
        """
        with self._lock:
            return self._holds.finish(hold_id)

    def release_hold(self, hold_id: str) -> None:
        """Drop the references of a hold. What was entered into the prefix cache can be hit as long as it lasts.

        Raises:
            UnknownRequestError: it was released before.
        """
        with self._lock:
            self._holds.release(hold_id)

    def holds(self) -> list[str]:
        """Names of the holds that are open, in the order they came."""
        with self._lock:
            return self._holds.open_ids()


def _places(chosen: np.ndarray) -> np.ndarray:
    """i32[n, 2]: (group, column) of the true entries of bool[G, columns], ascending by column."""
    return np.argwhere(chosen.T)[:, ::-1].astype(np.int32)
