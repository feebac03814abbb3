"""What instances say to each other: small JSON objects, each of a kind whose fields are checked one by one.

A message that came from outside is data and nothing more: no pickle, no field that is not named here, no number or list
beyond its bounds. What does not fit is a ``TransferError`` to whoever parses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pyagent_kv_jax.errors import TransferError

MAX_BYTES = 16 << 20
"""Of one message: a prompt of a million tokens fits."""
_MAX_TEXT = 4096
_SURROGATE = re.compile("[\ud800-\udfff]")

Message = dict[str, Any]


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _text(value: Any) -> bool:
    # JSON can spell half of a surrogate pair, which is no text: it cannot be written as UTF-8.
    return isinstance(value, str) and len(value) <= _MAX_TEXT and _SURROGATE.search(value) is None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and 0 <= x < 2**31 for x in value)


def _places(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(place, list) and len(place) == 2 and all(type(x) is int and 0 <= x < 2**31 for x in place)
        for place in value
    )


def _flat_object(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(each) or type(each) is int for each in (*value, *value.values()))


_NUMBER = _integer(0, 2**63 - 1)

KINDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # How a connection begins, and that it is alive.
    "hello": {"nonce": _text},
    "challenge": {"nonce": _text, "proof": _text},
    "introduce": {"identity": _flat_object},
    "welcome": {"identity": _flat_object, "bulk_address": _text},
    "refused": {"reason": _text},
    "ping": {},
    "pong": {},
    "bye": {},
    # Decode to prefill. ``id`` is the asking side's name for a load.
    "prefill": {"id": _NUMBER, "tokens": _tokens},
    "cancel": {"id": _NUMBER},
    "fetch": {"id": _NUMBER, "lease": _text, "part": _NUMBER, "places": _places},
    "got": {"uuid": _NUMBER},
    "unwanted": {"uuid": _NUMBER},
    "release": {"lease": _text},
    # Prefill to decode.
    "ready": {"id": _NUMBER, "lease": _text, "keys": _texts, "places": _places},
    "staged": {"id": _NUMBER, "part": _NUMBER, "uuid": _NUMBER},
    "failed": {"id": _NUMBER, "reason": _text},
}


def encoded(message: Message) -> bytes:
    """A message as it travels.

    Raises:
        TransferError: it is none, or too long.
    """
    data = json.dumps(checked(message), separators=(",", ":")).encode()
    if len(data) > MAX_BYTES:
        raise TransferError(f"message {message['kind']!r}: got {len(data)} bytes, want at most {MAX_BYTES}")
    return data


def decoded(data: bytes) -> Message:
    """What ``encoded`` made.

    Raises:
        TransferError: anything else.
    """
    if len(data) > MAX_BYTES:
        raise TransferError(f"message: got {len(data)} bytes, want at most {MAX_BYTES}")
    try:
        return checked(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise TransferError(f"message: got {data[:40]!r}, want JSON ({type(error).__name__})") from None


def checked(message: Any) -> Message:
    """``message``, if it is of a known kind and each field is as it should be.

    Raises:
        TransferError: otherwise.
    """
    kind = message.get("kind") if isinstance(message, dict) else None
    fields = KINDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise TransferError(f"message: got kind {str(kind)[:40]!r}, want one of {sorted(KINDS)}")
    if set(message) != {"kind", *fields}:
        raise TransferError(f"message {kind!r}: got fields {sorted(message)[:12]}, want {sorted(fields)}")
    for name, fits in fields.items():
        if not fits(message[name]):
            raise TransferError(f"message {kind!r}: got {name} {str(message[name])[:80]!r}, want another value or type")
    return message
