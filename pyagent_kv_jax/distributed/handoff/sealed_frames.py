"""Frames of the control channel: who does not know the shared token can neither read a meaning into it nor take part.

    both sides      know the token
    client -> server  nonce_c
    server -> client  nonce_s, HMAC(token, "server" | nonce_c | nonce_s)      the server knows the token
    from then on      every frame: HMAC(key of the direction, number | body), number, body
                      key = HMAC(token, direction | nonce_c | nonce_s)        the client does, too

HMAC-SHA256 throughout. Frames are counted, so none can be left out, repeated or moved to another connection. They are
not encrypted, and neither are the blocks: between hosts, use a network that you trust.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct

from pyagent_kv_jax.distributed.handoff.messages import Message, decoded, encoded
from pyagent_kv_jax.errors import ConfigError, TransferError

_PLAIN, _SEALED = b"\0", b"\1"
_MAC, _NUMBER = hashlib.sha256().digest_size, struct.Struct("<Q")
MAX_GREETING = 64 << 10
"""Bytes that are read of one who has not shown that he knows the token."""
MIN_TOKEN_BYTES = 16


def token_bytes(token: str | bytes) -> bytes:
    """The shared token.

    Raises:
        ConfigError: too short to be a secret.
    """
    data = token.encode() if isinstance(token, str) else bytes(token)
    if len(data) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"token: got {len(data)} bytes, want at least {MIN_TOKEN_BYTES}: secrets.token_hex() makes one"
        )
    return data


def new_nonce() -> str:
    """A number used once, in hexadecimal."""
    return secrets.token_hex(32)


def server_proof(token: bytes, client_nonce: str, server_nonce: str) -> str:
    """What only a server that knows the token can say to ``client_nonce``."""
    return _derived(token, "server", client_nonce, server_nonce).hex()


def same(a: str, b: str) -> bool:
    """Equality, in a time that tells nothing."""
    return hmac.compare_digest(a.encode(), b.encode())


def plain(message: Message) -> bytes:
    """A frame that anybody could have made: only of the greeting."""
    return _PLAIN + encoded(message)


def is_plain(frame: bytes) -> bool:
    """Whether it claims nothing."""
    return frame[:1] == _PLAIN


def opened_plain(frame: bytes) -> Message:
    """What ``plain`` made.

    Raises:
        TransferError: anything else, or too long for a greeting.
    """
    if not is_plain(frame) or len(frame) > MAX_GREETING:
        raise TransferError(f"greeting: got a frame of {len(frame)} bytes that is none, or too long")
    return decoded(frame[1:])


class Seals:
    """One side's seals of one connection: its own, and the other's."""

    def __init__(self, token: bytes, client_nonce: str, server_nonce: str, *, is_server: bool) -> None:
        to_server, to_client = (
            _derived(token, direction, client_nonce, server_nonce) for direction in ("to server", "to client")
        )
        self._mine, self._theirs = (to_client, to_server) if is_server else (to_server, to_client)
        self._sent = 0
        self._received = 0

    def seal(self, body: bytes) -> bytes:
        """The next frame to send, of an ``encoded`` message."""
        counted = _NUMBER.pack(self._sent) + body
        self._sent += 1
        return _SEALED + hmac.digest(self._mine, counted, "sha256") + counted

    def open(self, frame: bytes) -> Message:
        """The message of the next frame received.

        Raises:
            TransferError: the other side does not know the token, or this is not its next frame, or no message.
        """
        mac, counted = frame[1 : 1 + _MAC], frame[1 + _MAC :]
        if frame[:1] != _SEALED or not hmac.compare_digest(mac, hmac.digest(self._theirs, counted, "sha256")):
            raise TransferError("frame: got a wrong seal, want that of one who knows the token")
        if counted[: _NUMBER.size] != _NUMBER.pack(self._received):
            raise TransferError("frame: got one out of turn, want the next one")
        self._received += 1
        return decoded(counted[_NUMBER.size :])


def _derived(token: bytes, purpose: str, client_nonce: str, server_nonce: str) -> bytes:
    return hmac.digest(token, "|".join((purpose, client_nonce, server_nonce)).encode(), "sha256")
