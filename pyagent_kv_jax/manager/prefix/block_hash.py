"""Keys of full blocks: a chained digest of everything that decides what a block's K and V are.

    root      = H(tag, block size, salt, adapter)
    key[i]    = H(key[i - 1] | tokens of block i | multimodal items over block i),    key[-1] = root

A block's key thus names the whole prefix that ends with it, and two requests share a key only where they share all of
that. Every variable part is length-prefixed, so no two different inputs are the same bytes. Nothing depends on
``hash()``, the platform or the process: keys may be sent to another host.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, ShapeMismatchError

_TAG = b"kv block chain 1"
_TOKEN = np.dtype("<i4")
_MAX_POSITION = 2**31


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """An image, a sound, ...: its embeddings stand at tokens ``start .. start + length - 1`` of the request.

    ``item_id`` must name the content itself (a digest of it), since the tokens there are mere placeholders.
    """

    item_id: str
    start: int
    length: int

    def __post_init__(self) -> None:
        if not isinstance(self.item_id, str) or not self.item_id:
            raise InvalidArgumentError(f"item_id: got {self.item_id!r}, want a string that is not empty")
        numbers = (self.start, self.length)
        if not all(isinstance(number, int | np.integer) for number in numbers) or not (
            self.start >= 0 and self.length >= 1 and self.start + self.length <= _MAX_POSITION
        ):
            raise InvalidArgumentError(
                f"item {self.item_id!r}: got start {self.start}, length {self.length}, "
                f"want start >= 0, length >= 1 and an end of at most {_MAX_POSITION}"
            )

    @property
    def end(self) -> int:
        """First token after the item."""
        return int(self.start) + int(self.length)


@dataclass(frozen=True, slots=True)
class CacheExtras:
    """What, besides tokens, decides the content of a request's blocks.

    Attributes:
        salt: only requests of the same salt share blocks (one a tenant). None: shared with all who have none.
        adapter: name and path of the LoRA adapter, since a name may be loaded again from elsewhere.
        items: in any order; they may overlap each other, as the sound of a video does.
    """

    salt: str | None = None
    adapter: tuple[str, str] | None = None
    items: tuple[MultimodalItem, ...] = ()

    def __post_init__(self) -> None:
        if self.salt is not None and (not isinstance(self.salt, str) or not self.salt):
            raise InvalidArgumentError(f"salt: got {self.salt!r}, want None or a string that is not empty")
        if self.adapter is not None and not (
            isinstance(self.adapter, tuple)
            and len(self.adapter) == 2
            and all(isinstance(part, str) for part in self.adapter)
            and self.adapter[0]
        ):
            raise InvalidArgumentError(f"adapter: got {self.adapter!r}, want None or (name, path), the name not empty")
        if not isinstance(self.items, tuple) or not all(isinstance(item, MultimodalItem) for item in self.items):
            raise InvalidArgumentError(f"items: got {self.items!r}, want a tuple of MultimodalItem")


NO_EXTRAS = CacheExtras()


class ChainNode:
    """What a key was made of, kept only where the digest alone is no proof.

    Nodes of one content may be several objects; ``BlockKeys.matches`` makes them one where it finds them equal.
    """

    __slots__ = ("parent", "payload")

    def __init__(self, parent: ChainNode | None, payload: bytes) -> None:
        self.parent = parent
        self.payload = payload


@dataclass(frozen=True)
class BlockHasher:
    """Makes the keys of blocks of ``block_size`` tokens.

    Attributes:
        block_size: tokens a block.
        algorithm: "sha256": equal keys are equal content. "xxh3_128" (needs the package ``xxhash``), or any
            deterministic function from bytes to bytes: equal keys are compared by content, which costs memory.

    Raises:
        ConfigError: an unknown algorithm, one that is not installed, or a block size below 1.
    """

    block_size: int
    algorithm: str | Callable[[bytes], bytes] = "sha256"
    digest_of: Callable[[bytes], bytes] = field(init=False, repr=False, compare=False)
    _plain_root: tuple[bytes, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"block_size: got {self.block_size!r}, want an integer of at least 1")
        object.__setattr__(self, "digest_of", _digest_function(self.algorithm))
        object.__setattr__(self, "_plain_root", self._root(NO_EXTRAS))

    @property
    def is_collision_resistant(self) -> bool:
        """Whether equal keys prove equal content."""
        return self.algorithm == "sha256"

    def start(self, extras: CacheExtras = NO_EXTRAS) -> BlockKeys:
        """The keys of a request, none yet."""
        is_plain = extras.salt is None and extras.adapter is None
        root, payload = self._plain_root if is_plain else self._root(extras)
        node = None if self.is_collision_resistant else ChainNode(None, payload)
        return BlockKeys(self, extras, root, node)

    def _root(self, extras: CacheExtras) -> tuple[bytes, bytes]:
        """Digest and encoding of what comes before the first block."""
        payload = _TAG + struct.pack("<q", self.block_size) + _optional(extras.salt) + _optional(*extras.adapter or ())
        digest = self.digest_of(payload)
        if not isinstance(digest, bytes):
            raise ConfigError(f"algorithm: got {type(digest).__name__} from {self.algorithm!r}, want bytes")
        return digest, payload


class BlockKeys:
    """The keys of one request's full blocks, growing with it.

    Attributes:
        hasher, extras: what the keys are made with.
        digests: one key a full block; read only.
        nodes: the content behind each key, or None where the digest is proof enough.
    """

    __slots__ = ("_items_end", "_root", "_tokens", "digests", "extras", "hasher", "nodes", "root_node")

    def __init__(self, hasher: BlockHasher, extras: CacheExtras, root: bytes, root_node: ChainNode | None) -> None:
        self.hasher = hasher
        self.extras = extras
        self.digests: list[bytes] = []
        self.nodes: list[ChainNode] | None = None if root_node is None else []
        self.root_node = root_node
        self._root = root
        self._tokens: list[bytes] = []  # as they came: other block sizes need other keys
        self._items_end = max((item.end for item in extras.items), default=0)

    def __len__(self) -> int:
        return len(self.digests)

    def extend(self, tokens: np.ndarray) -> None:
        """Add the keys of the next whole blocks.

        Args:
            tokens: i32[n], n a multiple of the block size: the tokens that follow those already in.

        Raises:
            ShapeMismatchError: another shape or dtype.
        """
        width = _TOKEN.itemsize * self.hasher.block_size
        raw = _token_bytes(tokens)
        if len(raw) % width:
            raise ShapeMismatchError(f"tokens: got {len(tokens)}, want a multiple of {self.hasher.block_size}")
        payloads = [raw[start : start + width] for start in range(0, len(raw), width)]
        if self._items_end > len(self.digests) * self.hasher.block_size:
            self._add_items(payloads)
        digest_of = self.hasher.digest_of
        digest = self.digests[-1] if self.digests else self._root
        added = []
        for payload in payloads:
            digest = digest_of(digest + payload)
            added.append(digest)
        self.digests += added
        self._tokens.append(raw)
        if self.nodes is not None:
            node = self.nodes[-1] if self.nodes else self.root_node
            for payload in payloads:
                node = ChainNode(node, payload)
                self.nodes.append(node)

    def tokens(self) -> np.ndarray:
        """i32[len(self) * block_size]: what the keys are made of, besides ``extras``."""
        return np.frombuffer(b"".join(self._tokens), _TOKEN).astype(np.int32)

    def parent_of(self, index: int) -> bytes | None:
        """Key of the block before block ``index``; None for the first."""
        return self.digests[index - 1] if index else None

    def before(self, index: int) -> bytes:
        """What comes before block ``index``: the key of the block before it, or the chain's root."""
        return self.digests[index - 1] if index else self._root

    def copy(self) -> BlockKeys:
        """Keys of a fork: equal so far, growing apart from here."""
        other = BlockKeys(self.hasher, self.extras, self._root, self.root_node)
        other.digests, other._tokens = self.digests.copy(), self._tokens.copy()
        other.nodes = None if self.nodes is None else self.nodes.copy()
        return other

    def matches(self, index: int, stored: ChainNode) -> bool:
        """Whether ``stored`` has the content of block ``index`` and of all blocks before it.

        If so, this chain takes over the stored nodes: the next comparison along it ends at once.
        """
        assert self.nodes is not None
        mine: ChainNode | None = self.nodes[index]
        other: ChainNode | None = stored
        while mine is not other:
            if mine is None or other is None or mine.payload != other.payload:
                return False
            mine, other = mine.parent, other.parent
        self._adopt(self.nodes, index, stored)
        return True

    def _adopt(self, nodes: list[ChainNode], index: int, stored: ChainNode) -> None:
        if index + 1 < len(nodes):
            nodes[index + 1].parent = stored
        node: ChainNode | None = stored
        while index >= 0 and node is not None and nodes[index] is not node:
            nodes[index] = node
            node = node.parent
            index -= 1
        if index < 0:
            self.root_node = node

    def _add_items(self, payloads: list[bytes]) -> None:
        """Append to each of the next blocks' payloads the items over it."""
        size, first = self.hasher.block_size, len(self.digests)
        for item in sorted(self.extras.items, key=lambda item: (item.start, item.length, item.item_id)):
            begin = max(int(item.start) // size, first)
            end = min(-(-item.end // size), first + len(payloads))
            for block in range(begin, end):
                # The length too: with another length, the tokens after the item would be read as part of it.
                position = struct.pack("<qq", item.start - block * size, item.length)
                payloads[block - first] += _text(item.item_id) + position


def _digest_function(algorithm: str | Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    if algorithm == "sha256":
        return _sha256
    if algorithm == "xxh3_128":
        try:
            import xxhash
        except ImportError as error:
            raise ConfigError(
                "algorithm: got 'xxh3_128', which needs the package xxhash (the extra 'xxhash')"
            ) from error
        return xxhash.xxh3_128_digest
    if callable(algorithm):
        return algorithm
    raise ConfigError(f"algorithm: got {algorithm!r}, want 'sha256', 'xxh3_128' or a function from bytes to bytes")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _token_bytes(tokens: np.ndarray) -> bytes:
    """``tokens`` i32[n] as little-endian bytes, whatever the platform."""
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != np.int32:
        got = f"{tokens.dtype}{list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ShapeMismatchError(f"tokens: got {got}, want a numpy array int32[n]")
    return (tokens if tokens.dtype == _TOKEN else tokens.astype(_TOKEN)).tobytes()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")  # any string of Python's, each as other bytes
    return struct.pack("<q", len(data)) + data


def _optional(*texts: str | None) -> bytes:
    """How many texts there are, and each; one None counts as none."""
    present = [text for text in texts if text is not None]
    return struct.pack("<q", len(present)) + b"".join(map(_text, present))
