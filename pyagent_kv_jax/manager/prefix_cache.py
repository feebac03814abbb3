"""Which block holds which prefix: key -> block and block -> key, for every layer group.

Only names live here. Who holds a block, and which cached block is evicted next, is the pool's affair; it says what it
evicted and the caller calls ``forget``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple, NoReturn

import numpy as np

from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, InvalidBlockError, ShapeMismatchError
from pyagent_kv_jax.manager.block_hash import BlockHasher, BlockKeys, ChainNode
from pyagent_kv_jax.manager.events import BlockRemoved
from pyagent_kv_jax.manager.prefix_search import LocalSearch, Reach


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
        # Dicts of bytes and ints only: the garbage collector does not walk them.
        self._block_of: list[dict[bytes, int]] = [{} for _ in windows]
        self._key_of: dict[int, bytes] = {}
        self._node_of: dict[int, ChainNode] = {}  # empty where the digest is proof enough

    def __len__(self) -> int:
        """Cached blocks, over all groups."""
        return len(self._key_of)

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
        self._require_hasher(keys)
        if max_tokens < 0:
            raise InvalidArgumentError(f"max_tokens: got {max_tokens}, want at least 0")
        allowed = length = min(max_tokens // self.block_size, len(keys.digests))
        leading = {}
        for group in self._full:
            leading[group] = self._leading_blocks(group, keys, length)
            length = len(leading[group])
        searches = {group: LocalSearch(self._reaches[group], self._finder(group, keys)) for group in self._local}
        before = -1
        while length != before:  # until no group shortens it any more
            before = length
            for search in searches.values():
                length = search.longest(length)
        blocks = np.full((self.num_groups, length), -1, np.int32)
        for group, found in leading.items():
            blocks[group] = found[:length]
        for group, search in searches.items():
            first = self._reaches[group].first_needed(length)
            blocks[group, first:] = [search.found[index] for index in range(first, length)]
        limited_by = self._limiting_group(keys, length) if length < allowed and self.num_groups > 1 else None
        return PrefixHit(length * self.block_size, blocks, limited_by)

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
        array, ids = self._checked(group, block_ids)
        self._require_hasher(keys)
        last = first + len(ids)
        if not 0 <= first <= last <= len(keys.digests):
            raise InvalidArgumentError(f"got blocks {first} to {last - 1}, want them among {len(keys)} with a key")
        if keys.nodes is None:
            return self._enter(group, keys.digests[first:last], array, ids)
        return self._enter_verified(group, [(keys, index) for index in range(first, last)], array, ids)

    def insert_many(
        self, group: int, entries: Sequence[tuple[BlockKeys, int]], block_ids: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """``insert`` for blocks of several requests at once: entry (keys, index) is block ``index`` of a request."""
        array, ids = self._checked(group, block_ids)
        if len(entries) != len(ids):
            raise InvalidArgumentError(f"got {len(entries)} entries and {len(ids)} block ids, want one id an entry")
        digests = []
        for keys, index in entries:
            own = keys.digests
            if keys.hasher is not self._hasher:
                self._require_hasher(keys)
            if not 0 <= index < len(own):
                raise InvalidArgumentError(f"got block {index}, want one of {len(own)} that have a key")
            digests.append(own[index])
        if self._hasher is None or self._hasher.is_collision_resistant:
            return self._enter(group, digests, array, ids)
        return self._enter_verified(group, entries, array, ids)

    def forget(self, block_ids: Iterable[int] | np.ndarray) -> list[BlockRemoved]:
        """Take blocks out of the map; ids that are not in it (-1 too) are ignored.

        Returns:
            what was removed, one event a group.
        """
        removed: list[tuple[list[int], list[bytes]]] = [([], []) for _ in self._block_of]
        group, take = 0, self._key_of.pop
        for block in block_ids.tolist() if isinstance(block_ids, np.ndarray) else block_ids:
            key = take(block, None)
            if key is None:
                continue
            if self._block_of[group].get(key) != block:  # blocks of one group come in runs: ask the last one first
                group = self._group_of(block, key)
            del self._block_of[group][key]
            blocks, keys = removed[group]
            blocks.append(block)
            keys.append(key)
        if self._node_of:
            for block in chain.from_iterable(blocks for blocks, _ in removed):
                del self._node_of[block]
        return [BlockRemoved(group, tuple(blocks), tuple(keys)) for group, (blocks, keys) in enumerate(removed) if keys]

    def remap(self, old_ids: Sequence[int] | np.ndarray, new_ids: Sequence[int] | np.ndarray) -> None:
        """Follow blocks that moved, all at once: what was cached as ``old_ids[i]`` is cached as ``new_ids[i]``.

        Raises:
            InvalidArgumentError: not as many new ids as old ones.
            InvalidBlockError: an id outside the pool, one named twice, or a cached block that something moved onto.
        """
        old, new = self._checked(0, old_ids, lowest=0)[1], self._checked(0, new_ids, lowest=0)[1]
        if len(old) != len(new):
            raise InvalidArgumentError(f"got {len(old)} old and {len(new)} new ids, want one new id an old one")
        if any(len(set(ids)) != len(ids) for ids in (old, new)):
            raise InvalidBlockError("old_ids or new_ids: got an id twice, want each once")
        if overwritten := self._key_of.keys() & (set(new) - set(old)):
            raise InvalidBlockError(f"new_ids: blocks {sorted(overwritten)} are cached and stay; forget them first")
        nodes = {block: self._node_of[block] for block in old if block in self._node_of}
        moved = dict(zip(old, new, strict=True))
        for event in self.forget(old):
            for block, key in zip(event.block_ids, event.keys, strict=True):
                self._block_of[event.group][key] = moved[block]
                self._key_of[moved[block]] = key
        self._node_of |= {moved[block]: node for block, node in nodes.items()}

    def reset(self) -> None:
        """Forget every block."""
        for blocks in self._block_of:
            blocks.clear()
        self._key_of.clear()
        self._node_of.clear()

    def blocks_of(self, keys: BlockKeys) -> np.ndarray:
        """i32[groups, len(keys)]: the block that each group has under each key; -1: none."""
        self._require_hasher(keys)
        rows = [[-1 if block is None else block for block in self._found(group, keys)] for group in self._groups]
        return np.array(rows, np.int32).reshape(self.num_groups, len(keys))

    def cached_ids(self, keys: BlockKeys | None = None) -> np.ndarray:
        """i32[n]: all cached ids, or those under ``keys`` in any group."""
        if keys is None:
            return np.fromiter(self._key_of, np.int32, len(self._key_of))
        blocks = self.blocks_of(keys)
        return blocks[blocks >= 0]

    def key_of(self, block_id: int) -> bytes | None:
        """Key of a block; None: it is not cached."""
        return self._key_of.get(block_id)

    def check(self) -> None:
        """Raise ``InvalidBlockError`` where the two directions contradict each other. O(cached blocks)."""
        named = {block: key for blocks in self._block_of for key, block in blocks.items()}
        if sum(map(len, self._block_of)) != len(named):
            raise InvalidBlockError("a block has two keys, or stands in two groups")
        if named != self._key_of:
            wrong = sorted(block for block, _ in named.items() ^ self._key_of.items())
            raise InvalidBlockError(f"blocks {wrong}: key -> block and block -> key disagree")
        if outside := [block for block in named if not 0 <= block < self.num_blocks]:
            raise InvalidBlockError(f"blocks {sorted(outside)}: want ids of 0 to {self.num_blocks - 1}")
        verified = self._hasher is not None and not self._hasher.is_collision_resistant
        if self._node_of.keys() != (named.keys() if verified else set()):
            raise InvalidBlockError("the blocks with a key and those whose content is kept differ")

    @property
    def _groups(self) -> range:
        return range(self.num_groups)

    def _found(self, group: int, keys: BlockKeys, stop: int | None = None) -> Iterable[int | None]:
        """The block under each of the first ``stop`` keys, looked up as they are asked for."""
        if keys.nodes is None:
            return map(self._block_of[group].get, keys.digests[:stop])
        return map(self._finder(group, keys), range(len(keys))[:stop])

    def _finder(self, group: int, keys: BlockKeys) -> Callable[[int], int | None]:
        """A function from a block's index in the request to the block that has the same content."""
        get, digests = self._block_of[group].get, keys.digests
        if keys.nodes is None:
            return lambda index: get(digests[index])

        def verified(index: int) -> int | None:
            block = get(digests[index])
            return block if block is not None and keys.matches(index, self._node_of[block]) else None

        return verified

    def _leading_blocks(self, group: int, keys: BlockKeys, stop: int) -> list[int]:
        blocks = []
        for block in self._found(group, keys, stop):
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _limiting_group(self, keys: BlockKeys, length: int) -> int | None:
        # Every group serves ``length`` blocks, so of one block more it can only lack the last.
        lacking = [
            group
            for group in self._groups
            if self._reaches[group].first_needed(length + 1) <= length and self._finder(group, keys)(length) is None
        ]
        return lacking[0] if len(lacking) < self.num_groups else None

    def _enter(self, group: int, digests: list[bytes], array: np.ndarray, ids: list[int]) -> np.ndarray:
        enter, key_of = self._block_of[group].setdefault, self._key_of
        left_out = []
        for position, (digest, block) in enumerate(zip(digests, ids, strict=True)):
            if block in key_of or block < 0 or enter(digest, block) != block:
                left_out.append(position)
            else:
                key_of[block] = digest
        return np.delete(array, left_out) if left_out else array

    def _enter_verified(
        self, group: int, entries: Sequence[tuple[BlockKeys, int]], array: np.ndarray, ids: list[int]
    ) -> np.ndarray:
        """As ``_enter``, with the content compared where a digest is taken."""
        block_of = self._block_of[group]
        left_out = []
        for position, ((keys, index), block) in enumerate(zip(entries, ids, strict=True)):
            assert keys.nodes is not None
            digest = keys.digests[index]
            if block in self._key_of or block < 0:
                left_out.append(position)
            elif digest in block_of:
                self.num_collisions += not keys.matches(index, self._node_of[block_of[digest]])
                left_out.append(position)
            else:
                block_of[digest] = block
                self._key_of[block] = digest
                self._node_of[block] = keys.nodes[index]
        return np.delete(array, left_out) if left_out else array

    def _group_of(self, block: int, key: bytes) -> int:
        return next(group for group in self._groups if self._block_of[group].get(key) == block)

    def _require_hasher(self, keys: BlockKeys) -> None:
        if keys.hasher is self._hasher:
            return
        if self._hasher is None and keys.hasher.block_size == self.block_size:
            self._hasher = keys.hasher
        elif keys.hasher != self._hasher:
            want = self._hasher or f"block_size {self.block_size}"
            raise InvalidArgumentError(f"keys: got those of {keys.hasher}, want those of {want}")

    def _checked(
        self, group: int, block_ids: Sequence[int] | np.ndarray, lowest: int = -1
    ) -> tuple[np.ndarray, list[int]]:
        """The ids as a new i32[n] and as a list."""
        if not 0 <= group < self.num_groups:
            raise InvalidArgumentError(f"group: got {group}, want 0 to {self.num_groups - 1}")
        given = np.asarray(block_ids)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise ShapeMismatchError(f"block_ids: got {given.dtype}{list(given.shape)}, want int32[n]")
        ids = given.tolist()
        if ids and (min(ids) < lowest or max(ids) >= self.num_blocks):
            self._refuse_ids(ids, lowest)
        return given.astype(np.int32), ids

    def _refuse_ids(self, ids: list[int], lowest: int) -> NoReturn:
        outside = [block for block in ids if not lowest <= block < self.num_blocks]
        raise InvalidBlockError(f"block ids: got {outside[:8]}, want {lowest} to {self.num_blocks - 1}")
