"""A ZeroMQ socket in a thread of its own, so that heartbeats go on whatever the rest of the process does."""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

from pyagent_kv_jax.distributed.handoff.messages import MAX_BYTES
from pyagent_kv_jax.errors import ConfigError


def zeromq() -> Any:
    """The module ``zmq``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import zmq
    except ImportError as error:
        raise ConfigError("handoff between processes needs the package pyzmq (the extra 'handoff')") from error
    return zmq


def new_socket(kind: str) -> Any:
    """A "ROUTER" or "DEALER" socket with a context of its own, that leaves nothing behind when it is closed."""
    zmq = zeromq()
    made = zmq.Context(io_threads=1).socket(getattr(zmq, kind))
    made.linger = 0
    made.maxmsgsize = MAX_BYTES + 1024  # whoever sends more is disconnected
    return made


def close_socket(made: Any) -> None:
    """Close a socket of ``new_socket``, and its context."""
    made.close(0)
    made.context.term()


class SocketThread:
    """Owns a socket: hands over what arrives, does jobs that send, and calls ``tick`` now and then."""

    def __init__(
        self,
        made: Any,
        receive: Callable[[list[bytes]], None],
        tick: Callable[[], None],
        interval: float,
        hung_up: Callable[[], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            made: of ``new_socket``; nobody else touches it from now on.
            receive: given the parts of each message, in this thread.
            tick: called at least every ``interval`` seconds, in this thread.
            interval: seconds.
            hung_up: called, in this thread, when a TCP connection ends.
        """
        zmq = zeromq()
        self._socket = made
        self._receive, self._tick, self._hung_up = receive, tick, hung_up
        self._interval = interval
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._outbox: collections.deque[list[bytes]] = collections.deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._monitor = made.get_monitor_socket(zmq.EVENT_DISCONNECTED) if hung_up is not None else None
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run, name="handoff control", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Have ``job`` done in this thread, where it may ``send``; from any thread, in order, without waiting."""
        self._jobs.append(job)
        self._notify()

    def send(self, parts: list[bytes]) -> None:
        """Send a message; only in this thread."""
        self._outbox.append(parts)

    def close(self) -> None:
        """Do what was posted, send as far as it goes at once, and end."""
        if not self._stops.is_set():
            self._stops.set()
            self._notify()
            self._thread.join(timeout=5.0)
            self._wake.close()

    def _notify(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: there is nobody to wake
            self._wake.send(b"\0")

    def _run(self) -> None:
        zmq = zeromq()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._woken.fileno(), zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        while not self._stops.is_set():
            ready = dict(poller.poll(self._interval * 1000))
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            while True:
                try:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._receive(parts)
            if self._monitor is not None and self._hung_up is not None and self._monitor in ready:
                self._monitor.recv_multipart()
                self._hung_up()
            self._tick()
            self._send_all(zmq)
        self._send_all(zmq)
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._woken.close()
        self._socket.linger = 200  # milliseconds, for a goodbye
        self._socket.close()
        self._socket.context.term()

    def _send_all(self, zmq: Any) -> None:
        while self._jobs:
            self._jobs.popleft()()
        while self._outbox:
            try:
                self._socket.send_multipart(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return  # the other side does not read; its heartbeats will tell
            except zmq.ZMQError:
                pass  # to one who has gone
            self._outbox.popleft()
