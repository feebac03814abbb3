"""Which block holds which prefix: key -> block and block -> key, for every layer group.

Only names live here. Who holds a block, and which cached block is evicted next, is the pool's affair; it says what it
evicted and the caller calls ``evict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, InvalidBlockError, ShapeMismatchError
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher, BlockKeys, ChainNode
from pyagent_kv_jax.manager.prefix.chain_places import CachedBlocks, ChainPlaces, Places
from pyagent_kv_jax.manager.prefix.digest_map import WORDS, DigestMap
from pyagent_kv_jax.manager.prefix.events import BlockRemoved
from pyagent_kv_jax.manager.prefix.prefix_search import LocalSearch, Reach


class PrefixHit(NamedTuple):
    """The longest cached prefix that every group can continue from.

    Attributes:
        num_tokens: its length; a multiple of the block size.
        blocks: i32[groups, num_tokens / block_size]; -1 where the group needs no block any more.
        limited_by: the first group that lacks the next block although another group has it (or needs none); None where
            the groups agree that the prefix ends here, or it is as long as was allowed.
    """

    num_tokens: int
    blocks: np.ndarray
    limited_by: int | None


class Claim(NamedTuple):
    """Room for n blocks that are known by their keys, before it is known which blocks they are.

    Attributes:
        digests: u64[n, WORDS].
        places: i64[n] in each group's map; -1 where another block has the key.
        chain: where the blocks stand in their prefixes.
    """

    digests: np.ndarray
    places: list[np.ndarray]
    chain: Places


class PrefixCache:
    """The map of full, cached blocks. Not thread-safe: the caller's lock is above it.

    A key names at most one block a group; a block has at most one key, in one group. All keys come from hashers that
    are equal (one block size, one algorithm): the first one seen is the one.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: Sequence[int | None] = (None,),
        chunks: Sequence[int | None] | None = None,
    ) -> None:
        """Make an empty cache.

        Args:
            num_blocks: ids are 0 .. num_blocks - 1.
            block_size: tokens a block.
            windows: a layer group each: its sliding window in tokens, the query's own among them; None: no window.
            chunks: a layer group each: its chunk in tokens (a query sees its own chunk only); None: no chunks.

        Raises:
            ConfigError: a size below 1, no group, or not as many chunks as windows.
        """
        chunks = (None,) * len(windows) if chunks is None else chunks
        if not windows or len(chunks) != len(windows):
            raise ConfigError(f"got {len(windows)} windows and {len(chunks)} chunks, want one each a group")
        for name, size in [("num_blocks", num_blocks), ("block_size", block_size)]:
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name}: got {size!r}, want an integer of at least 1")
        if not all(span is None or (isinstance(span, int) and span >= 1) for span in (*windows, *chunks)):
            raise ConfigError(f"got windows {windows} and chunks {chunks}, want None or integers of at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_groups = len(windows)
        self.num_collisions = 0
        self._reaches = [Reach(block_size, window, chunk) for window, chunk in zip(windows, chunks, strict=True)]
        self._full = [group for group, reach in enumerate(self._reaches) if reach.is_full]
        self._local = [group for group, reach in enumerate(self._reaches) if not reach.is_full]
        self._hasher: BlockHasher | None = None
        self._maps = [DigestMap(num_blocks) for _ in windows]
        self._group_of = np.full(num_blocks, -1, np.int8)  # -1: not cached
        self._chain = ChainPlaces(num_blocks)
        # Of every cached block where the digest is no proof; else empty.
        self._content_of: dict[int, tuple[bytes, ChainNode]] = {}

    def emptied(self, num_blocks: int, block_size: int) -> PrefixCache:
        """An empty cache of blocks of another size, for the same layer groups; collisions are counted on."""
        windows, chunks = [r.window for r in self._reaches], [r.chunk for r in self._reaches]
        other = PrefixCache(num_blocks, block_size, windows, chunks)
        other.num_collisions = self.num_collisions
        return other

    def __len__(self) -> int:
        """Cached blocks, over all groups."""
        return sum(map(len, self._maps))

    @property
    def minimum_reusable_length(self) -> int:
        """Tokens the shortest prompt must have for any of it to be found: a whole block and one token to compute."""
        return self.block_size + 1

    def lookup(self, keys: BlockKeys, max_tokens: int) -> PrefixHit:
        """The longest cached prefix of whole blocks, of at most ``max_tokens`` tokens.

        Every group holds what the next token sees of it. Pass the prompt's length - 1: the last token must be computed,
        since its logits are wanted.

        Raises:
            InvalidArgumentError: ``max_tokens`` below 0, or keys of another hasher.
        """
        return self.lookup_many([(keys, max_tokens)])[0]

    def lookup_many(self, requests: Sequence[tuple[BlockKeys, int]]) -> list[PrefixHit]:
        """``lookup`` for many (keys, max_tokens) at once."""
        for keys, max_tokens in requests:
            self._require_hasher(keys)
            if max_tokens < 0:
                raise InvalidArgumentError(f"max_tokens: got {max_tokens}, want at least 0")
        allowed = [min(tokens // self.block_size, len(keys.digests)) for keys, tokens in requests]
        if self._full:  # most prompts are new from their first block on, and have nothing else to be looked up
            firsts = words_of([(keys, 0, min(most, 1)) for (keys, _), most in zip(requests, allowed, strict=True)])
            known = iter((self._maps[self._full[0]].find(firsts) >= 0).tolist())
            allowed_now = [most if most and next(known) else 0 for most in allowed]
        else:
            allowed_now = allowed
        digests = words_of([(keys, 0, most) for (keys, _), most in zip(requests, allowed_now, strict=True)])
        if self._full == [0] and self.num_groups == 1 and self._content_is_proven:
            return self._leading(self._maps[0].find(digests), allowed_now)
        found = np.stack([a_map.find(digests) for a_map in self._maps]) if len(digests) else None
        hits, start = [], 0
        for (keys, _), most, now in zip(requests, allowed, allowed_now, strict=True):
            if found is None or not now:
                hits.append(self._no_hit(keys, most))
            else:
                hits.append(self._longest(keys, found[:, start : start + now]))
            start += now
        return hits

    def _leading(self, found: np.ndarray, lengths: list[int]) -> list[PrefixHit]:
        """Of each request, whose ``lengths`` blocks stand one after another in ``found`` i32[n]: all before a miss."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        misses = np.append(np.flatnonzero(found < 0), len(found))
        stops = np.minimum(misses[np.searchsorted(misses, starts)], ends)
        return [
            PrefixHit((stop - start) * self.block_size, found[None, start:stop], None)
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        ]

    def _no_hit(self, keys: BlockKeys, allowed: int) -> PrefixHit:
        limited_by = None
        if allowed and self.num_groups > 1:
            firsts = words_of([(keys, 0, 1)])
            limited_by = self._limiting_group(keys, 0, [a_map.find(firsts) for a_map in self._maps])
        return PrefixHit(0, np.zeros((self.num_groups, 0), np.int32), limited_by)

    def _longest(self, keys: BlockKeys, found: np.ndarray) -> PrefixHit:
        """The longest prefix of which every group has what it needs; ``found`` i32[groups, n], by key."""
        length = found.shape[1]
        for group in self._full:
            length = self._num_leading(keys, found[group, :length])
        searches = {group: LocalSearch(self._reaches[group], self._finder(keys, found[group])) for group in self._local}
        before = -1
        while length != before:  # until no group shortens it any more
            before = length
            for search in searches.values():
                length = search.longest(length)
        blocks = found[:, :length].copy()
        for group in searches:
            blocks[group, : self._reaches[group].first_needed(length)] = -1
        limited_by = None
        if length < found.shape[1] and self.num_groups > 1:
            limited_by = self._limiting_group(keys, length, list(found))
        return PrefixHit(length * self.block_size, blocks, limited_by)

    def _num_leading(self, keys: BlockKeys, found: np.ndarray) -> int:
        """How many of the first keys have their block, one after another."""
        missing = found < 0
        leading = int(missing.argmax()) if missing.any() else len(found)
        if keys.nodes is None:
            return leading
        find = self._finder(keys, found)
        return next((index for index in range(leading) if find(index) is None), leading)

    def _finder(self, keys: BlockKeys, found: np.ndarray) -> Callable[[int], int | None]:
        """A function from a block's index in the request to the block that has the same content."""

        def find(index: int) -> int | None:
            block = int(found[index])
            return block if block >= 0 and self._is_content(keys, index, block) else None

        return find

    def _is_content(self, keys: BlockKeys, index: int, block: int) -> bool:
        return keys.nodes is None or keys.matches(index, self._content_of[block][1])

    def _limiting_group(self, keys: BlockKeys, length: int, found: list[np.ndarray]) -> int | None:
        # Every group serves ``length`` blocks, so of one block more it can only lack the last.
        lacking = [
            group
            for group in self._groups
            if self._reaches[group].first_needed(length + 1) <= length
            and self._finder(keys, found[group])(length) is None
        ]
        return lacking[0] if len(lacking) < self.num_groups else None

    def insert(self, group: int, keys: BlockKeys, first: int, block_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Enter a request's blocks ``first``, ``first + 1``, ... under their keys.

        Args:
            block_ids: i32[n]; -1, where a row has no block (left of a window), is left out.

        Returns:
            i32[m], the ids newly entered, in order. Left out are blocks that have a key already, and those whose key
            another block has: a duplicate, or a collision (the same digest of other content), which is counted.

        Raises:
            InvalidArgumentError: no such group, keys that do not reach so far, or keys of another hasher.
            InvalidBlockError: an id outside the pool.
        """
        ids = self._checked(group, block_ids)
        self._require_hasher(keys)
        last = first + len(ids)
        if not 0 <= first <= last <= len(keys.digests):
            raise InvalidArgumentError(f"got blocks {first} to {last - 1}, want them among {len(keys)} with a key")
        entered = [self._insert_one(group, keys, first + i, block) for i, block in enumerate(ids.tolist())]
        return ids[np.array(entered, bool)]

    def _insert_one(self, group: int, keys: BlockKeys, index: int, block: int) -> bool:
        if block < 0 or self._group_of[block] >= 0:
            return False
        digests = words_of([(keys, index, index + 1)])
        places = self._maps[group].claim(digests)
        if places[0] < 0:
            self.num_collisions += not self._is_content(keys, index, int(self._maps[group].find(digests)[0]))
            return False
        chain = Places.of_runs([(keys, index, index + 1)], digests[:, 0])
        self._fill(group, places, digests, np.array([block], np.int32), chain)
        if keys.nodes is not None:
            self._content_of[block] = keys.digests[index], keys.nodes[index]
        return True

    def _fill(self, group: int, places: np.ndarray, digests: np.ndarray, ids: np.ndarray, chain: Places) -> None:
        self._maps[group].fill(places, digests, ids)
        self._group_of[ids] = group
        self._chain.put(ids, chain)

    def claim(self, runs: Sequence[tuple[BlockKeys, int, int]]) -> Claim | None:
        """Make room, in all groups, for blocks of many requests whose ids are not known yet.

        Args:
            runs: (keys, first, last) each: blocks ``first`` up to, not including, ``last`` of a request.

        Returns:
            To be given to ``enter`` for every group, with no ``insert`` or lookup before. None where digests are no
            proof of content: then ``insert`` has to compare.
        """
        for keys, first, last in runs:
            if keys.hasher is not self._hasher:
                self._require_hasher(keys)
            if not 0 <= first <= last <= len(keys.digests):
                raise InvalidArgumentError(f"got blocks {first} to {last - 1}, want them among {len(keys)} with a key")
        if not self._content_is_proven:
            return None
        digests = words_of(runs)
        return Claim(digests, [a_map.claim(digests) for a_map in self._maps], Places.of_runs(runs, digests[:, 0]))

    def enter(self, group: int, claim: Claim, ids: np.ndarray) -> np.ndarray:
        """As ``insert``, for the blocks ``ids`` i32[n] of a claim, none twice; -1 for those that came to nothing."""
        digests, places, chain = claim.digests, claim.places[group], claim.chain
        fresh = (ids >= 0) & (self._group_of[ids] < 0)
        kept = fresh & (places >= 0)
        if not kept.all():
            self._maps[group].release(places[(places >= 0) & ~fresh])
            digests, places, ids, chain = digests[kept], places[kept], ids[kept], chain.of(kept)
        self._fill(group, places, digests, ids, chain)
        return ids

    def forget(self, block_ids: Iterable[int] | np.ndarray) -> list[BlockRemoved]:
        """Take blocks out of the map; ids that are not in it (-1 too) are ignored.

        Returns:
            what was removed, one event a group.
        """
        ids = np.fromiter(dict.fromkeys(block_ids), np.int64)
        ids = ids[(ids >= 0) & (ids < self.num_blocks)]
        return self.evict(ids[self._group_of[ids] >= 0])

    def evict(self, ids: np.ndarray, *, tell: bool = True) -> list[BlockRemoved]:
        """``forget`` for ids i32[n] that are all in the map, none twice; without ``tell`` it says nothing of them."""
        groups = self._group_of[ids] if self.num_groups > 1 else None
        events = []
        for group in self._groups:
            gone = ids if groups is None else ids[groups == group]
            if len(gone):
                if tell:
                    events.append(BlockRemoved(group, tuple(gone.tolist()), self._keys_of(group, gone)))
                self._maps[group].remove(gone)
        self._group_of[ids] = -1
        if self._content_of:
            for block in ids.tolist():
                self._content_of.pop(block, None)
        return events

    def remap(self, old_ids: Sequence[int] | np.ndarray, new_ids: Sequence[int] | np.ndarray) -> None:
        """Follow blocks that moved, all at once: what was cached as ``old_ids[i]`` is cached as ``new_ids[i]``.

        Raises:
            InvalidArgumentError: not as many new ids as old ones.
            InvalidBlockError: an id outside the pool, one named twice, or a cached block that something moved onto.
        """
        old, new = self._checked(0, old_ids, lowest=0), self._checked(0, new_ids, lowest=0)
        if len(old) != len(new):
            raise InvalidArgumentError(f"got {len(old)} old and {len(new)} new ids, want one new id an old one")
        if any(len(np.unique(ids)) != len(ids) for ids in (old, new)):
            raise InvalidBlockError("old_ids or new_ids: got an id twice, want each once")
        overwritten = np.setdiff1d(new, old)
        overwritten = overwritten[self._group_of[overwritten] >= 0]
        if len(overwritten):
            raise InvalidBlockError(f"new_ids: blocks {overwritten.tolist()} are cached and stay; forget them first")
        groups = self._group_of[old]
        for group in self._groups:
            self._maps[group].move(old[groups == group], new[groups == group])
        self._group_of[old] = -1
        self._group_of[new] = groups
        self._chain.move(old, new)
        moved = dict(zip(old.tolist(), new.tolist(), strict=True))
        self._content_of = {moved.get(block, block): content for block, content in self._content_of.items()}

    def reset(self) -> None:
        """Forget every block."""
        for a_map in self._maps:
            a_map.clear()
        self._group_of[:] = -1
        self._content_of.clear()

    def blocks_of(self, keys: BlockKeys) -> np.ndarray:
        """i32[groups, len(keys)]: the block that each group has under each key; -1: none."""
        self._require_hasher(keys)
        digests = words_of([(keys, 0, len(keys))])
        found = np.stack([a_map.find(digests) for a_map in self._maps])
        if keys.nodes is not None:
            for group, index in np.argwhere(found >= 0).tolist():
                if not self._is_content(keys, index, int(found[group, index])):
                    found[group, index] = -1
        return found

    def cached_ids(self, keys: BlockKeys | None = None) -> np.ndarray:
        """i32[n]: all cached ids, or those under ``keys`` in any group."""
        if keys is None:
            return np.flatnonzero(self._group_of >= 0).astype(np.int32)
        blocks = self.blocks_of(keys)
        return blocks[blocks >= 0]

    def count_hits(self, blocks: np.ndarray) -> None:
        """A request began with these blocks i32[...] of a ``PrefixHit``."""
        self._chain.count_hits(blocks[blocks >= 0])

    def cached_blocks(self, group: int = 0) -> CachedBlocks:
        """All blocks of a group that can be hit, and where they stand in the tree of prefixes. Costs O(pool)."""
        ids, chain = self._maps[group].blocks(), self._chain
        keys = self._maps[group].digests_of(ids)[:, 0].copy()
        return CachedBlocks(ids, keys, chain.parents[ids], chain.columns[ids], chain.hits[ids])

    def key_of(self, block_id: int) -> bytes | None:
        """Key of a block; None: it is not cached."""
        if not 0 <= block_id < self.num_blocks or (group := self._group_of[block_id]) < 0:
            return None
        return self._keys_of(group, np.array([block_id]))[0]

    def _keys_of(self, group: int, ids: np.ndarray) -> tuple[bytes, ...]:
        if self._content_of:
            return tuple(self._content_of[block][0] for block in ids.tolist())
        return tuple(digest.tobytes() for digest in self._maps[group].digests_of(ids))

    def check(self) -> None:
        """Raise ``InvalidBlockError`` where the parts contradict each other. O(pool)."""
        for group, a_map in enumerate(self._maps):
            a_map.check()
            if not np.array_equal(a_map.blocks(), np.flatnonzero(self._group_of == group)):
                raise InvalidBlockError(f"group {group}: its map and the groups of the blocks differ")
        if self._content_of.keys() != (set() if self._content_is_proven else set(self.cached_ids().tolist())):
            raise InvalidBlockError("the blocks with a key and those whose content is kept differ")

    @property
    def _content_is_proven(self) -> bool:
        """Whether equal keys are equal content."""
        return self._hasher is not None and self._hasher.is_collision_resistant

    @property
    def _groups(self) -> range:
        return range(self.num_groups)

    def _require_hasher(self, keys: BlockKeys) -> None:
        if keys.hasher is self._hasher:
            return
        if self._hasher is None and keys.hasher.block_size == self.block_size:
            self._hasher = keys.hasher
        elif keys.hasher != self._hasher:
            want = self._hasher or f"block_size {self.block_size}"
            raise InvalidArgumentError(f"keys: got those of {keys.hasher}, want those of {want}")

    def _checked(self, group: int, block_ids: Sequence[int] | np.ndarray, lowest: int = -1) -> np.ndarray:
        """The ids as a new i32[n]."""
        if not 0 <= group < self.num_groups:
            raise InvalidArgumentError(f"group: got {group}, want 0 to {self.num_groups - 1}")
        given = np.asarray(block_ids)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise ShapeMismatchError(f"block_ids: got {given.dtype}{list(given.shape)}, want int32[n]")
        outside = given[(given < lowest) | (given >= self.num_blocks)]
        if len(outside):
            raise InvalidBlockError(f"block ids: got {outside[:8].tolist()}, want {lowest} to {self.num_blocks - 1}")
        return given.astype(np.int32)


def words_of(runs: Sequence[tuple[BlockKeys, int, int]]) -> np.ndarray:
    """u64[n, WORDS]: the keys ``first`` up to ``last`` of each (keys, first, last), one after another.

    Keys of another length than SHA-256's are cut or filled up with zeros; what that makes equal is told apart by
    content, as it is for all keys but those.
    """
    digests = list(chain.from_iterable(keys.digests[first:last] for keys, first, last in runs))
    width = 8 * WORDS
    if runs and runs[0][0].nodes is not None:
        digests = [digest[:width].ljust(width, b"\0") for digest in digests]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, WORDS)
