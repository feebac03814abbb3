"""Handoff between real processes on loopback: equal tokens, refusals, and either side killed."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from pyagent_kv_jax.errors import TransferError
from pyagent_kv_jax.serving.handoff import DecodeInstance, PrefillServer, RemoteLink, remote_link
from pyagent_kv_jax.serving.handoff.prefill_instance import identity_of
from tests.serving.handoff_kills import DEADLINE, SLACK, kill_decode, kill_this_prefill
from tests.serving.handoff_process import (
    ANSWER,
    NAME,
    NUM_BLOCKS,
    OPTIONS,
    TIMEOUTS,
    TOKEN,
    alone,
    connected,
    first_line,
    new_prompts,
    process_to_kill,
    shared_engine,
)

pytest.importorskip("zmq")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """What the children compile, they compile once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def prefill_processes(cache_dir):
    """Gives (prefill process, what keeps what it has compiled, its address): the same one as long as it lives."""
    with contextlib.ExitStack() as stack:
        started = []

        def living():
            if not started or started[-1][0].poll() is not None:
                child, keep = stack.enter_context(process_to_kill("prefill", TOKEN, cache_dir=cache_dir))
                started.append((child, keep, first_line(child)))
            return started[-1]

        yield living


def test_two_processes_answer_like_one(prefill_processes):
    engine, (*_, address) = shared_engine("decode"), prefill_processes()
    prompts = [*new_prompts(np.random.default_rng(0), 5), [1, 2, 3]]
    with pytest.raises(TransferError, match="different tokens"):
        connected(engine, address, "some other token, as long")
    with pytest.raises(TransferError, match="model: got 'large', want 'small'"):
        DecodeInstance(engine, RemoteLink(address, TOKEN, engine, timeouts=TIMEOUTS), "large")
    decode = connected(engine, address, on_failure="fail")
    done = decode.generate(prompts, ANSWER)
    assert [entry.transfer_error for entry in done] == [None] * 6
    assert [entry.num_fetched for entry in done] == [(len(prompt) - 1) // 8 for prompt in prompts]
    (again,) = decode.generate([prompts[0] + [5] * 20], ANSWER)
    shared = len(prompts[0]) // 8
    assert again.num_present in (shared, shared - (len(prompts[0]) % 8 == 0))
    assert again.num_fetched == (len(prompts[0]) + 19) // 8 - again.num_present
    decode.close()
    engine.backend.check_invariants()
    assert engine.backend.get_num_free_blocks() == NUM_BLOCKS
    assert [entry.token_ids for entry in [*done, again]] == alone(engine, [*prompts, prompts[0] + [5] * 20])


def test_a_killed_prefill_process(prefill_processes):
    child, keep, address = prefill_processes()
    kill = kill_this_prefill(child, keep, address, "recompute", (1, 0))
    assert kill.lost > 0
    assert kill.noticed < DEADLINE + SLACK


def test_a_killed_decode_process(cache_dir):
    (kill,) = kill_decode(1, 2, cache_dir)
    assert kill.noticed < DEADLINE + SLACK


def test_a_link_connects_anew_when_the_server_is_back():
    engine = shared_engine("decode")
    server = PrefillServer(shared_engine("prefill"), NAME, TOKEN, timeouts=TIMEOUTS)
    link = RemoteLink(server.address, TOKEN, engine, timeouts=TIMEOUTS, retry_seconds=0.05)
    stop = serving(server)
    try:
        decode = DecodeInstance(engine, link, NAME, options=OPTIONS)
        prompts = new_prompts(np.random.default_rng(3), 4)
        assert decode.generate(prompts[:1], ANSWER)[0].transfer_error is None
        stop()
        port = int(server.address.rsplit(":", 1)[1])
        server.close()
        (lonely,) = decode.generate(prompts[1:2], ANSWER)
        assert "goodbye" in str(lonely.transfer_error) or "gone" in str(lonely.transfer_error)
        assert not link.is_open
        server = PrefillServer(shared_engine("prefill"), NAME, TOKEN, port=port, timeouts=TIMEOUTS)
        stop = serving(server)
        deadline = time.monotonic() + 60.0
        while not link.is_open:
            assert time.monotonic() < deadline
            assert not decode.generate([[1, 2, 3]], ANSWER)[0].failed
            with contextlib.suppress(TransferError):
                link.send({"kind": "cancel", "id": 99})  # whoever wants something makes it try
            time.sleep(0.01)
        (back,) = decode.generate(prompts[2:3], ANSWER)
        assert back.transfer_error is None
        assert back.num_fetched > 0
        decode.close()
    finally:
        stop()
        server.close()
    for each in (engine, shared_engine("prefill")):
        each.backend.check_invariants()
        assert each.backend.get_num_free_blocks() == NUM_BLOCKS


def test_a_link_closed_while_it_connects_keeps_no_connection(monkeypatch):
    engine, begun, may_go_on, made = shared_engine("decode"), threading.Event(), threading.Event(), []

    class Client:
        is_open, welcome = True, {"bulk_address": ""}

        def __init__(self, *_):
            made.append(self)
            begun.set()
            assert may_go_on.wait(60.0)

        def close(self):
            self.is_open = False

    monkeypatch.setattr(remote_link, "ControlClient", Client)
    link = RemoteLink("tcp://127.0.0.1:9", TOKEN, engine)
    link._identity = identity_of(engine.backend, NAME)
    with pytest.raises(TransferError, match="gone"):
        link.send({"kind": "cancel", "id": 0})
    assert begun.wait(60.0)
    link.close()
    may_go_on.set()
    link._attempt.join()
    assert not made[0].is_open
    assert not link.is_open


def serving(server):
    """Serve in a thread; call what is returned to stop."""
    stops = threading.Event()
    thread = threading.Thread(target=server.serve, args=(stops.is_set,), daemon=True)
    thread.start()

    def stop():
        stops.set()
        thread.join()

    return stop


def test_requests_cancelled_at_random_moments_leave_nothing_on_either_side():
    engine = shared_engine("decode")
    server = PrefillServer(shared_engine("prefill"), NAME, TOKEN, timeouts=TIMEOUTS)
    stop = serving(server)
    rng = np.random.default_rng(4)
    try:
        decode = connected(engine, server.address, on_failure="fail")
        for _ in range(12):
            prompts = new_prompts(rng, 3)
            entries = [decode.submit(prompt, ANSWER) for prompt in prompts]
            until = time.monotonic() + rng.uniform(0.0, 0.03)
            while time.monotonic() < until:
                decode.step()
            decode.cancel(entries[1])
            while decode.has_unfinished:
                decode.step()
            answered = [0, 2]
            assert [entries[i].transfer_error for i in answered] == [None, None]
            assert [entries[i].token_ids for i in answered] == alone(engine, [prompts[i] for i in answered])
        instance, deadline = server.instance, time.monotonic() + 60.0
        while instance.leases or instance.num_staged or instance.num_under_way:
            assert time.monotonic() < deadline
            decode.step()  # answers to what was cancelled still come
            time.sleep(0.01)
        decode.close()
    finally:
        stop()
        server.close()
    for each in (engine, server.instance.engine):
        each.backend.check_invariants()
        assert each.backend.holds() == []
        assert each.backend.get_num_free_blocks() == NUM_BLOCKS
