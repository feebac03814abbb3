"""One prompt's blocks on their way from a prefill instance into the prefix cache of this one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pyagent_kv_jax.distributed.handoff.block_transfer import CHUNK_BYTES, blocks_of_bytes
from pyagent_kv_jax.distributed.handoff.messages import Message
from pyagent_kv_jax.errors import InvalidArgumentError, OutOfBlocksError, TransferError, UnknownRequestError
from pyagent_kv_jax.manager.block_import import PrefixHold
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.serving.handoff.prefill_link import PendingBlocks, PrefillLink
from pyagent_kv_jax.tables.padding import chunks


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How blocks are fetched.

    Attributes:
        seconds: a load that has taken so long, the other side's computing included, has failed.
        chunk_bytes: blocks of about so many bytes travel together.
        window: so many such parts are under way at a time, so that reading, sending and writing overlap.

    Raises:
        InvalidArgumentError: not positive.
    """

    seconds: float = 60.0
    chunk_bytes: int = CHUNK_BYTES
    window: int = 3

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.chunk_bytes >= 1 and self.window >= 1):
            raise InvalidArgumentError(f"got {self}, want positive numbers")


DEFAULT_LOAD_OPTIONS = LoadOptions()


class BlockLoad:
    """Asks for a prompt, and fetches what is not here yet. Ends with ``close``, whatever became of it.

    Nothing can be hit before all of it has arrived. What the load holds stays until it is closed, so that a request
    that is admitted before then finds the prefix.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        link: PrefillLink,
        load_id: int,
        tokens: np.ndarray,
        options: LoadOptions,
        clock: Callable[[], float],
    ) -> None:
        """Ask.

        Raises:
            TransferError: nobody is there.
        """
        self.load_id = load_id
        self.tokens = tokens
        self.hold: PrefixHold | None = None
        self.num_fetched = 0
        self.is_done = False
        self.lacks_room = False
        self._manager = manager
        self._link = link
        self._options = options
        self._clock = clock
        self._deadline = clock() + options.seconds
        self._offer: Message | None = None
        self._parts: list[np.ndarray] = []
        self._next_part = 0
        self._asked: set[int] = set()
        self._pulls: dict[int, tuple[int, PendingBlocks]] = {}
        link.send({"kind": "prefill", "id": load_id, "tokens": tokens.tolist()})

    @property
    def num_present(self) -> int:
        """Blocks that were here before, and did not have to be sent."""
        return 0 if self.hold is None else len(self.hold.present)

    @property
    def is_under_way(self) -> bool:
        """Whether it has blocks of the pool that wait for content."""
        return self.hold is not None and not self.is_done

    def receive(self, message: Message) -> None:
        """Take in an answer.

        Raises:
            TransferError: the other side could not do it, or answers what was not asked.
        """
        kind = message["kind"]
        if kind == "failed":
            raise TransferError(f"the prefill instance failed: {message['reason']}")
        if kind == "ready" and self._offer is None:
            self._offer = message
        elif kind == "staged" and message["part"] in self._asked:
            part = message["part"]
            self._asked.discard(part)
            try:
                self._pulls[part] = message["uuid"], self._link.pull(message["uuid"], len(self._parts[part]))
            except TransferError:
                self._say(kind="unwanted", uuid=message["uuid"])
                raise
        else:
            raise TransferError(f"the prefill instance says {kind!r} of load {self.load_id}, which was not asked")

    def advance(self) -> bool:
        """Do what can be done now; whether anything was.

        Raises:
            TransferError: it took too long, or what was on its way will not come.
        """
        if self._clock() >= self._deadline and not self.is_done:
            raise TransferError(f"load {self.load_id}: not complete after {self._options.seconds} s")
        if self._offer is None or self.is_done:
            return False
        if self.hold is None:
            try:
                self._begin(self._offer)
            except OutOfBlocksError:
                self.lacks_room = True  # until requests end
                return False
            self.lacks_room = False
        moved = self._write_what_came()
        self._ask_for_more()
        if not self._pulls and not self._asked:
            assert self.hold is not None
            self._manager.finish_import(self.hold.hold_id)
            self.is_done = True
            self._release_lease()
        return moved or self.is_done

    def close(self) -> None:
        """Give everything back, here and there."""
        if self.hold is not None:
            with contextlib.suppress(UnknownRequestError):  # freed as a request, under memory pressure for instance
                self._manager.release_hold(self.hold.hold_id)
            self.hold = None
        for uuid, _ in self._pulls.values():
            self._say(kind="got", uuid=uuid)  # it is on its way and will come, for nobody
        self._pulls = {}
        if not self.is_done:
            self.is_done = True
            self._release_lease()

    def _begin(self, offer: Message) -> None:
        """Take blocks for what is missing here."""
        hold = self.hold = self._manager.begin_import(self.tokens)
        keys = [key.hex() for key in hold.keys]
        if offer["keys"] != keys[: len(offer["keys"])]:
            raise TransferError(f"load {self.load_id}: was offered blocks of other content than asked for")
        offered = {tuple(place) for place in offer["places"]}
        missing = [place for place in hold.wanted.tolist() if tuple(place) in offered]
        largest = blocks_of_bytes(self._manager.config, self._options.chunk_bytes)
        places = np.array(missing, np.int32).reshape(-1, 2)
        self._parts = [places[chunk] for chunk in chunks(len(places), largest)]

    def _write_what_came(self) -> bool:
        assert self.hold is not None
        arrived = [(part, uuid, blocks) for part, (uuid, p) in self._pulls.items() if (blocks := p.poll()) is not None]
        for part, uuid, blocks in arrived:
            del self._pulls[part]
            self._say(kind="got", uuid=uuid)  # whether it can be written or not
            self._manager.write_import(self.hold.hold_id, self._parts[part], blocks)
            self.num_fetched += len(self._parts[part])
        return bool(arrived)

    def _ask_for_more(self) -> None:
        assert self._offer is not None
        while self._next_part < len(self._parts) and len(self._pulls) + len(self._asked) < self._options.window:
            part, self._next_part = self._next_part, self._next_part + 1
            self._asked.add(part)
            places = self._parts[part].tolist()
            lease = self._offer["lease"]
            self._link.send({"kind": "fetch", "id": self.load_id, "lease": lease, "part": part, "places": places})

    def _release_lease(self) -> None:
        if self._offer is None:
            self._say(kind="cancel", id=self.load_id)
        else:
            self._say(kind="release", lease=self._offer["lease"])

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(TransferError):  # who is gone keeps nothing for us
            self._link.send(message)
