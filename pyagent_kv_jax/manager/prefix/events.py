"""What happened to cached blocks, for routers and outside indexes: typed events in a bounded log.

A reader that follows ``BlockStored`` and ``BlockRemoved`` from the start, or from an ``AllBlocksCleared``, knows which
prefixes this cache holds. A key may be stored again while it is there; a block's id is a hint for debugging, its key is
its name. The facts carried are those of vLLM's KV events (vllm/distributed/kv_events.py), with swaps besides.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from pyagent_kv_jax.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks of one request can now be hit.

    Attributes:
        group: layer group.
        block_ids, keys: one each a block, in the order of the chain.
        parent_key: key of the block before the first; None at the start of a request.
        adapter: (name, path) of the LoRA adapter the blocks were computed with.
    """

    group: int
    block_ids: tuple[int, ...]
    keys: tuple[bytes, ...]
    parent_key: bytes | None
    adapter: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks of ``group`` can no longer be hit: evicted, or taken out on purpose."""

    group: int
    block_ids: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BlocksSwapped:
    """A request's blocks moved to the host ("out") or back to the device ("in")."""

    request_id: str
    direction: Literal["out", "in"]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """No block of any group can be hit."""


Event = BlockStored | BlockRemoved | BlocksSwapped | AllBlocksCleared


class EventLog:
    """The last ``capacity`` events that nobody has read. One writer and one reader may run at the same time.

    A reader that never reads costs the oldest events, not memory: ``num_dropped`` says how many were lost, and a reader
    that sees it grow must start afresh. Capacity 0 keeps nothing; ask ``enabled`` before building an event.
    """

    def __init__(self, capacity: int) -> None:
        if not isinstance(capacity, int) or capacity < 0:
            raise InvalidArgumentError(f"capacity: got {capacity!r}, want an integer of at least 0")
        self.capacity = capacity
        self.enabled = capacity > 0
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._num_dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    @property
    def num_dropped(self) -> int:
        """Events lost unread since the log was made."""
        return self._num_dropped

    def append(self, event: Event) -> None:
        """Add an event; at capacity the oldest unread one goes."""
        if not self.enabled:
            return
        with self._lock:
            if len(self._events) == self.capacity:
                self._events.popleft()
                self._num_dropped += 1
            self._events.append(event)

    def drain(self) -> list[Event]:
        """All unread events, oldest first; they are gone from the log."""
        with self._lock:  # held for a swap only: a long log does not keep the writer waiting
            events, self._events = self._events, deque()
        return list(events)
