"""The prefill side of a handoff: computes prompts, keeps their blocks under leases, reads out what others ask for."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.leases import LeaseBook
from pyagent_kv_jax.distributed.handoff.messages import Message
from pyagent_kv_jax.errors import ConfigError, KVCacheError, OutOfBlocksError, TransferError, UnknownRequestError
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.request import Request
from pyagent_kv_jax.serving.sampling import SamplingParams

_MOST_STAGED = 32  # parts that one peer may leave unfetched
_MOST_REASON = 1000
_ONE_TOKEN = SamplingParams(max_tokens=1)


class Stage(Protocol):
    """Where blocks wait for the other side to fetch them."""

    def put(self, blocks: Blocks) -> int:
        """Keep ``blocks`` under a new number."""
        ...

    def fetched(self, uuid: int) -> None:
        """The other side has them, or will."""
        ...

    def drop(self, uuid: int) -> None:
        """Let go of blocks that nobody fetched."""
        ...


@dataclasses.dataclass
class PrefillStats:
    """Counts since an instance was made: prompts computed, prompts that were cached whole, blocks read out."""

    num_computed: int = 0
    num_cached: int = 0
    num_blocks_read: int = 0


class PrefillInstance:
    """An engine that works for others. All of it runs in one thread: ``receive``, ``step`` and ``replies``.

    A prompt is computed as far as its last full block and ends as content of the prefix cache, held by a lease. Leases
    take rows of the cache: as many prompts are under way or leased at a time as the cache has rows
    (``max_num_reqs``) beyond the engine's ``max_num_seqs``; others wait.

    Args:
        engine: its own, around a ``KVCacheManager``.
        stage: where blocks are put that were asked for.
        model_name: names the weights, the same on both sides; for instance their ``model_fingerprint``.
        lease_seconds: that blocks are kept after their lease was last used.
        clock: in seconds.

    Raises:
        ConfigError: another backend, or a cache without rows to spare.
    """

    def __init__(
        self,
        engine: Engine,
        stage: Stage,
        model_name: str,
        *,
        lease_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.manager, self.num_places = manager_of(engine)
        self.identity = identity_of(self.manager, model_name)
        self.stats = PrefillStats()
        self.leases = LeaseBook(self._release_hold, lease_seconds, self.num_places, clock)
        self._stage = stage
        self._waiting: collections.deque[tuple[str, int, np.ndarray]] = collections.deque()
        self._running: dict[str, tuple[str, int, Request]] = {}
        self._staged: dict[str, list[int]] = {}
        self._replies: list[tuple[str, Message]] = []
        self._lacks_blocks = False  # until somebody gives some back

    # -- what others say ---------------------------------------------------------------------------------------

    def receive(self, peer: str, message: Message) -> None:
        """Take in a checked message; nothing it says raises."""
        handlers: dict[str, Callable[[str, Any], None]] = {
            "prefill": self._asked,
            "cancel": self._cancelled,
            "fetch": self._fetch,
            "got": self._got,
            "unwanted": self._got,
            "release": self._released,
        }
        if (handler := handlers.get(message["kind"])) is not None:
            try:
                handler(peer, message)
            except (KVCacheError, RuntimeError) as error:  # JAX's: no memory to read blocks into, for instance
                if "id" in message:  # a late release of what has expired is nobody's failure
                    self._fail(peer, message["id"], error)

    def drop_peer(self, peer: str) -> None:
        """Give back all that is kept for a peer that is gone."""
        self._waiting = collections.deque(asked for asked in self._waiting if asked[0] != peer)
        for request_id, (who, _, request) in list(self._running.items()):
            if who == peer:
                del self._running[request_id]
                self.engine.abort(request)
        self.leases.end_those_of(peer)
        self._lacks_blocks = False
        for uuid in self._staged.pop(peer, []):
            self._stage.drop(uuid)
        self._tidy()

    def _asked(self, peer: str, message: Message) -> None:
        tokens, size = np.array(message["tokens"], np.int32), self.manager.config.block_size
        tokens = tokens[: (len(tokens) - 1) // size * size]  # its last token is computed where it is decoded
        if not len(tokens):
            raise TransferError(f"prompt: got {len(message['tokens'])} tokens, want more than a block of {size}")
        self.engine.make_request(tokens.tolist(), _ONE_TOKEN)  # raises: says what is wrong with it
        self._waiting.append((peer, message["id"], tokens))

    def _cancelled(self, peer: str, message: Message) -> None:
        self._waiting = collections.deque(a for a in self._waiting if a[:2] != (peer, message["id"]))
        for request_id, (who, load_id, request) in list(self._running.items()):
            if (who, load_id) == (peer, message["id"]):
                del self._running[request_id]
                self.engine.abort(request)
        self._lacks_blocks = False
        self._tidy()

    def _fetch(self, peer: str, message: Message) -> None:
        hold_id = self.leases.use(message["lease"], peer).hold_id
        staged = self._staged.setdefault(peer, [])
        if len(staged) >= _MOST_STAGED:
            raise TransferError(f"fetch: got part {message['part']} with {len(staged)} parts waiting, want fewer")
        if not message["places"]:
            raise TransferError(f"fetch: got no places for part {message['part']}, want at least one")
        places = np.array(message["places"], np.int32)
        blocks = self.manager.read_hold(hold_id, places)
        uuid = self._stage.put(blocks)
        staged.append(uuid)
        self.stats.num_blocks_read += len(places)
        self._reply(peer, kind="staged", id=message["id"], part=message["part"], uuid=uuid)

    def _got(self, peer: str, message: Message) -> None:
        if message["uuid"] in (staged := self._staged.get(peer, [])):
            staged.remove(message["uuid"])
            if message["kind"] == "unwanted":
                self._stage.drop(message["uuid"])
            else:
                self._stage.fetched(message["uuid"])

    def _released(self, peer: str, message: Message) -> None:
        self.leases.use(message["lease"], peer)  # raises: it is another's, or has expired
        self.leases.end(message["lease"])
        self._lacks_blocks = False

    # -- its own work ------------------------------------------------------------------------------------------

    @property
    def num_under_way(self) -> int:
        """Prompts that wait or are computed."""
        return len(self._waiting) + len(self._running)

    @property
    def num_staged(self) -> int:
        """Parts that were read out, and of which nobody has said that he got them."""
        return sum(map(len, self._staged.values()))

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would compute anything."""
        return (self.engine.has_unfinished and not self._lacks_blocks) or bool(self._waiting and self._has_room())

    def step(self) -> None:
        """End leases whose time is up, begin what waits, and compute one step."""
        if self.leases.expire():
            self._lacks_blocks = False
        while self._waiting and self._has_room():
            self._begin(*self._waiting.popleft())
        if self.engine.has_unfinished and not self._lacks_blocks:
            self._step_engine()
        self._tidy()

    def replies(self) -> list[tuple[str, Message]]:
        """(peer, message) each, since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def close(self) -> None:
        """Give everything back."""
        self._waiting.clear()
        self._running.clear()
        self.engine.abort_all()
        self.leases.end_all()
        for peer in list(self._staged):
            self.drop_peer(peer)

    def _has_room(self) -> bool:
        return len(self.leases) + len(self._running) < self.num_places

    def _begin(self, peer: str, load_id: int, tokens: np.ndarray) -> None:
        try:
            if not self._offer(peer, load_id, tokens, at_least=len(tokens)):
                request = self.engine.make_request(tokens.tolist(), _ONE_TOKEN)
                self.engine.add([request])
                self._running[request.request_id] = peer, load_id, request
            else:
                self.stats.num_cached += 1
        except KVCacheError as error:
            self._fail(peer, load_id, error)

    def _offer(self, peer: str, load_id: int, tokens: Sequence[int] | np.ndarray, at_least: int = 0) -> bool:
        """Lease what is cached of ``tokens``, if that is so much."""
        hold = self.manager.hold_prefix(np.asarray(tokens, np.int32))
        if hold.num_tokens < at_least:
            self.manager.release_hold(hold.hold_id)
            return False
        lease = self.leases.open(peer, hold.hold_id)
        keys, places = [key.hex() for key in hold.keys], hold.present.tolist()
        self._reply(peer, kind="ready", id=load_id, lease=lease.lease_id, keys=keys, places=places)
        return True

    def _step_engine(self) -> None:
        try:
            new_tokens, _ = self.engine.step()
        except OutOfBlocksError as error:
            if len(self.leases):  # they will end
                self._lacks_blocks = True
            else:
                self._broke_off(error)
            return
        except Exception as error:  # whatever it was: others must hear of it, and their blocks come back
            self._broke_off(error)
            return
        for request, _, _ in new_tokens:
            if request.finish_reason is not None and request.request_id in self._running:
                peer, load_id, _ = self._running.pop(request.request_id)
                self.stats.num_computed += 1
                try:
                    self._offer(peer, load_id, request.prompt)
                except KVCacheError as error:
                    self._fail(peer, load_id, error)

    def _broke_off(self, error: Exception) -> None:
        """After a step that failed, pages may have been lost: no lease is worth anything any more."""
        for peer, load_id, _ in self._running.values():
            self._fail(peer, load_id, error)
        self._running.clear()
        self.engine.abort_all()
        self.leases.end_all()
        self.manager.reset_prefix_cache()

    def _tidy(self) -> None:
        if not self.engine.has_unfinished:
            self.engine.abort_all()  # what the last ones held comes back now, and not with a step that may never be

    def _release_hold(self, hold_id: str) -> None:
        with contextlib.suppress(UnknownRequestError):  # freed as a request, under memory pressure for instance
            self.manager.release_hold(hold_id)

    def _fail(self, peer: str, load_id: int, error: Exception) -> None:
        self._reply(peer, kind="failed", id=load_id, reason=f"{type(error).__name__}: {error}"[:_MOST_REASON])

    def _reply(self, peer: str, **message: Any) -> None:
        self._replies.append((peer, message))


def manager_of(engine: Engine) -> tuple[KVCacheManager, int]:
    """The engine's cache, and how many rows it has for holds.

    Raises:
        ConfigError: no ``KVCacheManager`` with a prefix cache, or one without rows to spare.
    """
    manager = engine.backend
    if not isinstance(manager, KVCacheManager) or not manager.options.prefix_caching:
        raise ConfigError(f"backend: got {type(manager).__name__}, want a KVCacheManager with prefix_caching")
    spare = manager.config.max_num_reqs - engine.config.max_num_seqs
    if spare < 1:
        raise ConfigError(
            f"max_num_reqs: got {manager.config.max_num_reqs}, want more than the engine's max_num_seqs "
            f"{engine.config.max_num_seqs}: each block transfer under way takes a row"
        )
    return manager, spare


def device_of(engine: Engine) -> jax.Device:
    """The device that blocks leave from and arrive at; of a mesh, its first one."""
    manager, _ = manager_of(engine)
    devices: list[Any] = list(manager.pages.k_pages.sharding.device_set)
    return min(devices, key=lambda device: device.id)


def identity_of(manager: KVCacheManager, model_name: str) -> InstanceIdentity:
    """What an instance says of itself."""
    return InstanceIdentity.of(model_name, manager.pages, manager.options.hash_algorithm)
