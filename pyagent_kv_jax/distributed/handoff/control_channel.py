"""The control channel: small authenticated messages between one prefill process and those that decode.

Who does not know the token, speaks another protocol or serves another model is refused, and told why; whatever anybody
sends, the server goes on. A peer from which nothing was heard for ``peer_timeout`` seconds is gone: heartbeats are sent
in between by a thread of their own.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from typing import Any, NamedTuple

from pyagent_kv_jax.distributed.handoff import sealed_frames as frames
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.messages import Message, encoded
from pyagent_kv_jax.distributed.handoff.socket_thread import SocketThread, close_socket, new_socket, zeromq
from pyagent_kv_jax.errors import ConfigError, TransferError

_GREETING_SECONDS = 10.0  # to say who one is
_MOST_STRANGERS = 256  # connections that have not


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds after which the other side is given up.

    Attributes:
        heartbeat: between two signs of life.
        peer_timeout: without a sign of life.
        connect: until a connection stands and both have been found to fit.

    Raises:
        ConfigError: not positive, or no room for two heartbeats in ``peer_timeout``.
    """

    heartbeat: float = 1.0
    peer_timeout: float = 5.0
    connect: float = 10.0

    def __post_init__(self) -> None:
        if not (self.heartbeat > 0 and self.connect > 0 and self.peer_timeout >= 2 * self.heartbeat):
            raise ConfigError(f"got {self}, want positive seconds, and peer_timeout at least twice heartbeat")


DEFAULT_TIMEOUTS = Timeouts()


class Heard(NamedTuple):
    """What a server heard: a message, or (None) that a peer is gone."""

    peer: str
    message: Message | None


@dataclasses.dataclass
class _Peer:
    """One connection, as the server sees it."""

    seals: frames.Seals
    last_heard: float
    is_known: bool = False  # it has shown that it knows the token, and fits


class ControlServer:
    """The prefill side of the channel."""

    def __init__(
        self,
        token: str | bytes,
        identity: InstanceIdentity,
        bulk_address: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        """Listen.

        Args:
            token: shared secret, at least 16 bytes.
            identity: of this instance.
            bulk_address: where blocks can be fetched, told to those who are welcome.
            host: address of this machine to listen at; only this machine's own processes reach the default.
            port: 0: any that is free, see ``address``.
            timeouts: when peers are given up.

        Raises:
            ConfigError: pyzmq is not installed, or a token that is too short.
            TransferError: the address cannot be listened at.
        """
        self._token = frames.token_bytes(token)
        self._identity = identity
        self._bulk_address = bulk_address
        self._timeouts = timeouts
        self._peers: dict[bytes, _Peer] = {}
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self.num_malformed = 0
        made = new_socket("ROUTER")
        try:
            made.bind(f"tcp://{host}:{port}")
        except zeromq().ZMQError as error:
            close_socket(made)
            raise TransferError(f"control channel: cannot listen at {host}:{port} ({error})") from error
        self.address: str = made.getsockopt_string(zeromq().LAST_ENDPOINT)
        self._thread = SocketThread(made, self._receive, self._tick, timeouts.heartbeat / 2)

    def poll(self, seconds: float = 0.0) -> list[Heard]:
        """What was heard since the last call; waits up to so many seconds for the first."""
        heard = []
        try:
            heard.append(self._heard.get(timeout=seconds) if seconds > 0 else self._heard.get_nowait())
            while True:
                heard.append(self._heard.get_nowait())
        except queue.Empty:
            return heard

    def send(self, peer: str, message: Message) -> None:
        """Say something to a peer; one that is gone does not hear it.

        Raises:
            TransferError: no message, or too long.
        """
        body = encoded(message)
        self._thread.post(lambda: self._send(bytes.fromhex(peer), body))

    def close(self) -> None:
        """Say goodbye to all, and stop."""
        self._thread.post(self._say_goodbye)
        self._thread.close()

    # -- in the socket's thread --------------------------------------------------------------------------------

    def _send(self, name: bytes, body: bytes) -> None:
        peer = self._peers.get(name)
        if peer is not None and peer.is_known:
            self._thread.send([name, peer.seals.seal(body)])

    def _say_goodbye(self) -> None:
        for name in self._peers:
            self._send(name, encoded({"kind": "bye"}))

    def _receive(self, parts: list[bytes]) -> None:
        name, frame = parts[0], parts[-1]
        try:
            if len(parts) != 2:
                raise TransferError(f"message: got {len(parts)} parts, want 2")
            if frames.is_plain(frame):
                self._greet(name, frames.opened_plain(frame))
            else:
                self._take_in(name, frame)
        except TransferError as error:
            self.num_malformed += 1
            self._refuse(name, error)

    def _greet(self, name: bytes, message: Message) -> None:
        """A stranger says hello; one who does so again begins anew."""
        if message["kind"] != "hello":
            raise TransferError(f"greeting: got {message['kind']!r}, want 'hello'")
        self._forget(name)
        strangers = [each for each, peer in self._peers.items() if not peer.is_known]
        if len(strangers) >= _MOST_STRANGERS:
            del self._peers[strangers[0]]
        nonce = frames.new_nonce()
        seals = frames.Seals(self._token, message["nonce"], nonce, is_server=True)
        self._peers[name] = _Peer(seals, time.monotonic())
        proof = frames.server_proof(self._token, message["nonce"], nonce)
        self._thread.send([name, frames.plain({"kind": "challenge", "nonce": nonce, "proof": proof})])

    def _take_in(self, name: bytes, frame: bytes) -> None:
        peer = self._peers.get(name)
        if peer is None:
            raise TransferError("connection: is not known here any more, want a new one")
        if not peer.is_known and len(frame) > frames.MAX_GREETING:
            raise TransferError(f"greeting: got {len(frame)} bytes, want at most {frames.MAX_GREETING}")
        message = peer.seals.open(frame)
        peer.last_heard = time.monotonic()
        if not peer.is_known:
            self._introduced(name, peer, message)
        elif message["kind"] == "ping":
            self._send(name, encoded({"kind": "pong"}))
        elif message["kind"] == "bye":
            self._forget(name)
        else:
            self._heard.put(Heard(name.hex(), message))

    def _introduced(self, name: bytes, peer: _Peer, message: Message) -> None:
        if message["kind"] != "introduce":
            raise TransferError(f"greeting: got {message['kind']!r}, want 'introduce'")
        self._identity.check(message["identity"])
        peer.is_known = True
        mine = dataclasses.asdict(self._identity)
        self._send(name, encoded({"kind": "welcome", "identity": mine, "bulk_address": self._bulk_address}))

    def _refuse(self, name: bytes, error: TransferError) -> None:
        self._forget(name)
        reason = f"{error}"[:1000]
        self._thread.send([name, frames.plain({"kind": "refused", "reason": reason})])

    def _forget(self, name: bytes) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None and peer.is_known:
            self._heard.put(Heard(name.hex(), None))

    def _tick(self) -> None:
        now = time.monotonic()
        for name, peer in list(self._peers.items()):
            patience = self._timeouts.peer_timeout if peer.is_known else _GREETING_SECONDS
            if now - peer.last_heard > patience:
                self._forget(name)


class ControlClient:
    """The decode side of the channel. One connection; when it has ended, make another."""

    def __init__(
        self, address: str, token: str | bytes, identity: InstanceIdentity, timeouts: Timeouts = DEFAULT_TIMEOUTS
    ) -> None:
        """Connect, and find out whether both fit.

        Args:
            address: ``ControlServer.address``.
            token: shared secret.
            identity: of this instance.
            timeouts: when the server is given up.

        Raises:
            ConfigError: pyzmq is not installed, or a token that is too short.
            TransferError: nobody answers, or refuses: another token, model, version or geometry.
        """
        self._token = frames.token_bytes(token)
        self._timeouts = timeouts
        self._heard: queue.SimpleQueue[Message | TransferError] = queue.SimpleQueue()
        self._ended: TransferError | None = None
        made = new_socket("DEALER")
        try:
            made.connect(address)
            self._seals, self.welcome = self._greet(made, address, identity)
        except zeromq().ZMQError as error:
            close_socket(made)
            raise TransferError(f"control channel: got address {address!r} ({error}), want tcp://HOST:PORT") from error
        except BaseException:
            close_socket(made)
            raise
        self._last_heard = self._last_said = time.monotonic()
        self._thread = SocketThread(made, self._receive, self._tick, timeouts.heartbeat / 2, self._hung_up)

    @property
    def is_open(self) -> bool:
        """Whether the other side was there when it was last heard of."""
        return self._ended is None

    def send(self, message: Message) -> None:
        """Say something.

        Raises:
            TransferError: the connection has ended, or this is no message, or too long.
        """
        body = encoded(message)
        if self._ended is not None:
            raise TransferError(str(self._ended))
        self._thread.post(lambda: self._thread.send([self._seals.seal(body)]))

    def poll(self, seconds: float = 0.0) -> list[Message]:
        """What was answered since the last call; waits up to so many seconds for the first.

        Raises:
            TransferError: the connection has ended; once.
        """
        heard: list[Message] = []
        try:
            answer = self._heard.get(timeout=seconds) if seconds > 0 else self._heard.get_nowait()
            while True:
                if isinstance(answer, TransferError):
                    raise answer
                heard.append(answer)
                answer = self._heard.get_nowait()
        except queue.Empty:
            return heard

    def close(self) -> None:
        """Say goodbye, and stop."""
        body = encoded({"kind": "bye"})
        self._thread.post(lambda: self._thread.send([self._seals.seal(body)]))
        self._end("it was closed here", tell=False)
        self._thread.close()

    def _greet(self, made: Any, address: str, identity: InstanceIdentity) -> tuple[frames.Seals, Message]:
        deadline = time.monotonic() + self._timeouts.connect

        def answer() -> bytes:
            if not made.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TransferError(f"control channel: nobody answers at {address} within {self._timeouts.connect} s")
            return made.recv_multipart()[-1]

        nonce = frames.new_nonce()
        made.send(frames.plain({"kind": "hello", "nonce": nonce}))
        challenge = _not_refused(frames.opened_plain(answer()))
        if challenge["kind"] != "challenge":
            raise TransferError(f"control channel: got {challenge['kind']!r} from {address}, want 'challenge'")
        if not frames.same(challenge["proof"], frames.server_proof(self._token, nonce, challenge["nonce"])):
            raise TransferError(f"control channel: {address} refused, or is refused: the two have different tokens")
        seals = frames.Seals(self._token, nonce, challenge["nonce"], is_server=False)
        made.send(seals.seal(encoded({"kind": "introduce", "identity": dataclasses.asdict(identity)})))
        frame = answer()
        welcome = _not_refused(frames.opened_plain(frame) if frames.is_plain(frame) else seals.open(frame))
        if welcome["kind"] != "welcome":
            raise TransferError(f"control channel: got {welcome['kind']!r} from {address}, want 'welcome'")
        identity.check(welcome["identity"])
        return seals, welcome

    # -- in the socket's thread --------------------------------------------------------------------------------

    def _receive(self, parts: list[bytes]) -> None:
        if self._ended is not None:
            return
        try:
            frame = parts[-1]
            message = _not_refused(frames.opened_plain(frame) if frames.is_plain(frame) else self._seals.open(frame))
        except TransferError as error:
            self._end(str(error))
            return
        self._last_heard = time.monotonic()
        if message["kind"] == "bye":
            self._end("it said goodbye")
        elif message["kind"] != "pong":
            self._heard.put(message)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._ended is None and now - self._last_heard > self._timeouts.peer_timeout:
            self._end(f"nothing was heard of it for {self._timeouts.peer_timeout} s")
        if self._ended is None and now - self._last_said >= self._timeouts.heartbeat:
            self._last_said = now
            self._thread.send([self._seals.seal(encoded({"kind": "ping"}))])

    def _hung_up(self) -> None:
        self._end("its connection was cut")

    def _end(self, why: str, tell: bool = True) -> None:
        if self._ended is None:
            self._ended = TransferError(f"the prefill instance is gone: {why}")
            if tell:
                self._heard.put(self._ended)


def _not_refused(message: Message) -> Message:
    if message["kind"] == "refused":
        raise TransferError(f"the prefill instance refused: {message['reason']}")
    return message
