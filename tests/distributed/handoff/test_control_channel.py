"""The control channel over loopback: who may speak, who is refused, who is noticed to be gone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pyagent_kv_jax import ConfigError
from pyagent_kv_jax.distributed.handoff import sealed_frames as frames
from pyagent_kv_jax.distributed.handoff.control_channel import ControlClient, ControlServer, Timeouts
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.messages import MAX_BYTES, decoded, encoded
from pyagent_kv_jax.distributed.handoff.socket_thread import close_socket, new_socket
from pyagent_kv_jax.errors import TransferError

zmq = pytest.importorskip("zmq")

TOKEN = "a token that two sides share"
ME = InstanceIdentity(1, "0.1", "model", '{"block_size": 16}', "sha256", "")
PATIENT = Timeouts(heartbeat=1.0, peer_timeout=20.0, connect=20.0)
QUICK = Timeouts(heartbeat=0.2, peer_timeout=1.0, connect=20.0)
ASK = {"kind": "prefill", "id": 3, "tokens": [1, 2, 3]}


@pytest.fixture
def server():
    server = ControlServer(TOKEN, ME, "127.0.0.1:99", timeouts=PATIENT)
    yield server
    server.close()


def heard(server, count=1, seconds=20.0):
    """The next ``count`` things the server hears."""
    found, deadline = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        found += server.poll(0.1)
    assert len(found) == count
    return found


def answers(client, seconds=20.0):
    found, deadline = [], time.monotonic() + seconds
    while not found and time.monotonic() < deadline:
        found = client.poll(0.1)
    return found


def assert_serves(server):
    client = ControlClient(server.address, TOKEN, ME, PATIENT)
    client.send(ASK)
    (said,) = heard(server)
    assert said.message == ASK
    server.send(said.peer, {"kind": "failed", "id": 3, "reason": "no"})
    assert answers(client) == [{"kind": "failed", "id": 3, "reason": "no"}]
    client.close()
    assert heard(server) == [(said.peer, None)]


def test_messages_go_both_ways_in_order(server):
    assert server.address.startswith("tcp://127.0.0.1:")
    client = ControlClient(server.address, TOKEN, ME, PATIENT)
    assert client.welcome["bulk_address"] == "127.0.0.1:99"
    for number in range(50):
        client.send({"kind": "cancel", "id": number})
    said = heard(server, 50)
    assert [each.message["id"] for each in said] == list(range(50))
    assert len({each.peer for each in said}) == 1
    client.close()
    with pytest.raises(TransferError, match="closed here"):
        client.send(ASK)
    assert heard(server) == [(said[0].peer, None)]
    assert_serves(server)


@pytest.mark.parametrize(
    ("token", "changes", "wanted"),
    [
        ("a token that nobody else has", {}, "different tokens"),
        (TOKEN, {"model": "another"}, "model: got 'another', want 'model'"),
        (TOKEN, {"library": "9.9"}, "library: got '9.9', want '0.1'"),
        (TOKEN, {"protocol": 7}, "protocol: got '7', want 1"),
        (TOKEN, {"geometry": "{}"}, "geometry: got '{}'"),
        (TOKEN, {"hash_algorithm": "md5"}, "hash_algorithm: got 'md5', want 'sha256'"),
    ],
)
def test_who_does_not_fit_is_refused_and_told_why(server, token, changes, wanted):
    with pytest.raises(TransferError, match=wanted):
        ControlClient(server.address, token, dataclasses.replace(ME, **changes), PATIENT)
    assert_serves(server)


def test_the_server_itself_refuses_a_wrong_token(server, monkeypatch):
    monkeypatch.setattr(frames, "same", lambda a, b: True)  # a client that does not look
    with pytest.raises(TransferError, match="refused: frame: got a wrong seal"):
        ControlClient(server.address, "a token that nobody else has", ME, PATIENT)
    monkeypatch.undo()
    assert_serves(server)


class Careless(InstanceIdentity):
    def check(self, other):
        pass


def test_a_client_looks_at_the_server_too(server):
    server._identity = Careless(**{**dataclasses.asdict(ME), "model": "another"})
    with pytest.raises(TransferError, match="model: got 'another', want 'model'"):
        ControlClient(server.address, TOKEN, ME, PATIENT)


def greeted(server):
    """A raw socket that has shown that it knows the token, and its seals."""
    made = new_socket("DEALER")
    made.connect(server.address)
    nonce = frames.new_nonce()
    made.send(frames.plain({"kind": "hello", "nonce": nonce}))
    assert made.poll(20_000)
    challenge = frames.opened_plain(made.recv())
    seals = frames.Seals(frames.token_bytes(TOKEN), nonce, challenge["nonce"], is_server=False)
    made.send(seals.seal(encoded({"kind": "introduce", "identity": dataclasses.asdict(ME)})))
    assert made.poll(20_000)
    assert seals.open(made.recv())["kind"] == "welcome"
    return made, seals


def test_malformed_messages_kill_nobody(server):
    rng = np.random.default_rng(0)
    stranger = new_socket("DEALER")
    stranger.connect(server.address)
    junk = [b"", b"\0", b"\1", b"\0{}", b"\0[]", b"\0" + b"[" * 100_000, b"\1" + bytes(31), b"\1" + bytes(40)]
    junk += [b'\0{"kind": "welcome", "identity": {}, "bulk_address": ""}', b'\0{"kind":"hello","nonce":5}', b"\2"]
    junk += [b'\0{"kind": "hello", "nonce": "\\ud800"}']
    junk += [rng.bytes(int(n)) for n in rng.integers(1, 3000, 20)]
    for frame in junk:
        stranger.send(frame)
    stranger.send_multipart([b"\0", b"\0"])
    for _ in range(len(junk) + 1):
        assert stranger.poll(20_000)
        assert frames.opened_plain(stranger.recv())["kind"] == "refused"
    assert server.num_malformed == len(junk) + 1
    assert server.poll() == []
    assert_serves(server)
    close_socket(stranger)


@pytest.mark.parametrize("how", ["out of turn", "again", "changed", "no message", "another's"])
def test_a_known_peer_that_breaks_the_rules_is_dropped(server, how):
    made, seals = greeted(server)
    good = seals.seal(encoded(ASK))
    bad = {
        "out of turn": lambda: seals.seal(encoded(ASK)),
        "again": lambda: good,
        "changed": lambda: good[:-2] + b"9}",
        "no message": lambda: seals.seal(b'{"kind": "prefill", "id": -1, "tokens": []}'),
        "another's": lambda: frames.Seals(b"x" * 16, "a", "b", is_server=False).seal(encoded(ASK)),
    }[how]()
    if how in ("again", "no message"):
        made.send(good)
        assert heard(server)[0].message == ASK
    made.send(bad)
    (end,) = heard(server)
    assert end.message is None  # what was kept for it can be given back
    assert made.poll(20_000)
    assert frames.opened_plain(made.recv())["kind"] == "refused"
    assert_serves(server)
    close_socket(made)


@pytest.mark.parametrize(
    "message",
    [
        None,
        7,
        [],
        {},
        {"kind": "nothing"},
        {"kind": ["prefill"]},
        {"kind": "prefill", "id": 1},
        {"kind": "prefill", "id": 1, "tokens": [1], "more": 1},
        {"kind": "prefill", "id": True, "tokens": [1]},
        {"kind": "prefill", "id": 1.0, "tokens": [1]},
        {"kind": "prefill", "id": 1, "tokens": [2**31]},
        {"kind": "prefill", "id": 1, "tokens": [True]},
        {"kind": "prefill", "id": 1, "tokens": "abc"},
        {"kind": "fetch", "id": 1, "lease": "x", "part": 0, "places": [[1]]},
        {"kind": "fetch", "id": 1, "lease": "x", "part": 0, "places": [[-1, 0]]},
        {"kind": "fetch", "id": 1, "lease": "x" * 5000, "part": 0, "places": []},
        {"kind": "staged", "id": 1, "part": 0, "uuid": 2**63},
        {"kind": "refused", "reason": None},
        {"kind": "refused", "reason": "\ud800"},
        {"kind": "introduce", "identity": {"model": ["nested"]}},
        {"kind": "introduce", "identity": {"\udfff": "x"}},
    ],
)
def test_messages_are_checked_field_by_field(message):
    with pytest.raises(TransferError, match="message"):
        encoded(message)


def test_what_is_no_json_is_no_message():
    for data in (b"\xff\xfe", b"{", b"NaN", b"[" * 50_000, b" " * (MAX_BYTES + 1)):
        with pytest.raises(TransferError, match="message"):
            decoded(data)


BOTH_SIDES = """
import sys, time
from tests.distributed.handoff.test_control_channel import *
server = ControlServer(TOKEN, ME, "", timeouts=QUICK)
print(server.address, flush=True)
while True:
    client = ControlClient(sys.argv[1], TOKEN, ME, QUICK)
    client.send(ASK)
    while client.is_open:
        time.sleep(0.01)
"""


def test_who_falls_silent_or_is_killed_is_noticed_from_both_sides():
    server = ControlServer(TOKEN, ME, "", timeouts=QUICK)
    child = subprocess.Popen([sys.executable, "-c", BOTH_SIDES, server.address], stdout=subprocess.PIPE, text=True)
    try:
        address = child.stdout.readline().strip()
        for how in (signal.SIGSTOP, signal.SIGKILL):
            (said,) = heard(server, seconds=60.0)
            assert said.message == ASK
            client = ControlClient(address, TOKEN, ME, QUICK)
            assert server.poll(1.5) == []  # it is alive for longer than the timeout
            assert client.poll() == []
            os.kill(child.pid, how)
            assert heard(server) == [(said.peer, None)]
            with pytest.raises(TransferError, match="gone"):
                answers(client)
            assert not client.is_open
            with pytest.raises(TransferError, match="gone"):
                client.send(ASK)
            client.close()
            os.kill(child.pid, signal.SIGCONT)  # begins anew
    finally:
        child.kill()
        child.wait()
        server.close()


def test_bad_arguments():
    with pytest.raises(ConfigError, match="at least 16"):
        ControlServer("short", ME, "")
    with pytest.raises(TransferError, match="nobody answers"):
        ControlClient("tcp://127.0.0.1:9", TOKEN, ME, Timeouts(connect=0.2))
    with pytest.raises(TransferError, match="HOST:PORT"):
        ControlClient("nowhere", TOKEN, ME)
    with pytest.raises(TransferError, match="cannot listen"):
        ControlServer(TOKEN, ME, "", host="203.0.113.1")
    with pytest.raises(ConfigError, match="peer_timeout"):
        Timeouts(heartbeat=3.0, peer_timeout=5.0)


def test_without_pyzmq_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match="extra 'handoff'"):
        ControlServer(TOKEN, ME, "")
