"""Instances in different processes: the loop of a prefill process, and a decode instance's link to it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.handoff.bulk_transfer import BulkEndpoint
from pyagent_kv_jax.distributed.handoff.control_channel import (
    DEFAULT_TIMEOUTS,
    ControlClient,
    ControlServer,
    Timeouts,
)
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.messages import Message
from pyagent_kv_jax.errors import TransferError
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.handoff.prefill_instance import PrefillInstance, device_of
from pyagent_kv_jax.serving.handoff.prefill_link import PendingBlocks

_QUICKLY = 2.0  # seconds that an attempt to connect anew may take


class PrefillServer:
    """A prefill instance that other processes can reach, until ``close``.

    It listens at loopback addresses unless told otherwise. Messages are authenticated, but neither they nor the blocks
    are encrypted: between hosts, use a network that you trust.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        token: str | bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        lease_seconds: float = 60.0,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        """Listen; nothing is answered before ``serve`` or ``run_once``.

        Args:
            engine: its own, around a ``KVCacheManager``.
            model_name: names the weights, the same on both sides; for instance their ``model_fingerprint``.
            token: shared secret, at least 16 bytes.
            host: address of this machine to listen at, by which the others reach it.
            port: of the control channel; 0: any that is free.
            lease_seconds: that blocks are kept after their lease was last used.
            timeouts: a decode process from which nothing was heard for ``peer_timeout`` is gone, and what was kept for
                it comes back.

        Raises:
            ConfigError: pyzmq is not installed, a token that is too short, or as ``PrefillInstance``.
            TransferError: an address that cannot be listened at, or blocks that JAX cannot send here.
        """
        self._stage = BulkEndpoint(device_of(engine), host=host)
        self.instance = PrefillInstance(engine, self._stage, model_name, lease_seconds=lease_seconds)
        self.channel = ControlServer(
            token, self.instance.identity, self._stage.address, host=host, port=port, timeouts=timeouts
        )

    @property
    def address(self) -> str:
        """For ``RemoteLink``."""
        return self.channel.address

    def run_once(self, seconds: float = 0.05) -> None:
        """Hear, compute a step, and answer; waits up to so many seconds where there is nothing to do."""
        for peer, message in self.channel.poll(0.0 if self.instance.has_work else seconds):
            if message is None:
                self.instance.drop_peer(peer)
            else:
                self.instance.receive(peer, message)
        self.instance.step()
        for peer, reply in self.instance.replies():
            try:
                self.channel.send(peer, reply)
            except TransferError as error:  # too long for a message
                self.channel.send(peer, {"kind": "failed", "id": reply["id"], "reason": str(error)})

    def serve(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work until ``until()``, looked at between steps."""
        while not until():
            self.run_once()

    def close(self) -> None:
        """Say goodbye, and give everything back."""
        self.channel.close()
        self.instance.close()


class RemoteLink:
    """A decode instance's link to a ``PrefillServer`` in another process. It connects anew when the server is back."""

    def __init__(
        self,
        address: str,
        token: str | bytes,
        engine: Engine,
        *,
        host: str = "127.0.0.1",
        retry_seconds: float = 1.0,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        """Nobody is asked before a ``DecodeInstance`` introduces itself.

        Args:
            address: ``PrefillServer.address``.
            token: shared secret.
            engine: of the decode instance.
            host: address of this machine that blocks are fetched from.
            retry_seconds: between two attempts to reach a server that is gone.
            timeouts: a server from which nothing was heard for ``peer_timeout`` is gone.

        Raises:
            TransferError: JAX cannot fetch blocks here.
        """
        self._address = address
        self._token = token
        self._timeouts = timeouts
        self._config: KVCacheConfig = engine.backend.config
        self._endpoint = BulkEndpoint(device_of(engine), host=host)
        self._identity: InstanceIdentity | None = None
        self._client: ControlClient | None = None
        self._retry_seconds = retry_seconds
        self._tried = 0.0
        self._attempt: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()  # over who has the connection: attempts to make one run beside all else

    @property
    def is_open(self) -> bool:
        """Whether the server was there when it was last heard of."""
        return self._client is not None and self._client.is_open

    def introduce(self, identity: InstanceIdentity) -> None:
        """See ``PrefillLink``."""
        client = ControlClient(self._address, self._token, identity, self._timeouts)
        with self._lock:
            self._drop_client()
            self._identity, self._client = identity, client

    def send(self, message: Message) -> None:
        """See ``PrefillLink``."""
        if self._client is None:
            self._try_again()
            raise TransferError(f"the prefill instance at {self._address} is gone")
        self._client.send(message)

    def poll(self) -> list[Message]:
        """See ``PrefillLink``."""
        if self._client is None:
            return []
        try:
            return self._client.poll()
        except TransferError:
            with self._lock:
                self._drop_client()
            raise

    def pull(self, uuid: int, num_blocks: int) -> PendingBlocks:
        """See ``PrefillLink``."""
        if self._client is None:
            raise TransferError(f"the prefill instance at {self._address} is gone")
        return self._endpoint.pull(self._client.welcome["bulk_address"], uuid, self._config, num_blocks)

    def wait(self, seconds: float) -> None:
        """See ``PrefillLink``."""
        time.sleep(seconds)

    def close(self) -> None:
        """See ``PrefillLink``."""
        with self._lock:
            self._closed = True
            self._drop_client()

    def _drop_client(self) -> None:
        if self._client is not None:
            self._endpoint.forget(self._client.welcome["bulk_address"])
            self._client.close()
            self._client = None

    def _try_again(self) -> None:
        """Look, beside all else, whether the server is back."""
        now = time.monotonic()
        busy = self._attempt is not None and self._attempt.is_alive()
        if self._closed or busy or now - self._tried < self._retry_seconds:
            return
        self._tried = now
        self._attempt = threading.Thread(target=self._connect, name="handoff reconnect", daemon=True)
        self._attempt.start()

    def _connect(self) -> None:
        assert self._identity is not None
        timeouts = dataclasses.replace(self._timeouts, connect=min(self._timeouts.connect, _QUICKLY))
        try:
            client = ControlClient(self._address, self._token, self._identity, timeouts)
        except TransferError:
            return  # at the next request
        with self._lock:
            wanted = not self._closed and self._client is None
            if wanted:
                self._client = client
        if not wanted:
            client.close()
