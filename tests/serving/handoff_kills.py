"""One side of a handoff killed (SIGKILL) at random moments, and what must be true of the other side afterwards."""

from __future__ import annotations

import pathlib
import random
import subprocess
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.errors import TransferError
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.handoff import DecodeInstance, HandoffRequest, PrefillServer
from pyagent_kv_jax.serving.handoff.decode_instance import OnFailure
from tests.serving.handoff_process import (
    ANSWER,
    NAME,
    NUM_BLOCKS,
    TIMEOUTS,
    TOKEN,
    alone,
    connected,
    first_line,
    new_prompts,
    process_to_kill,
    shared_engine,
)

DEADLINE = TIMEOUTS.peer_timeout + 1.0
"""Seconds from the kill until nothing waits for the dead side any more, and nothing is kept for it."""
SLACK = 30.0
"""On top of it in tests, for machines that do something else besides."""
_STARTING = 120.0  # seconds that a child may take to be ready
_LONGEST = 1.5  # seconds of traffic before the kill


class Kill(NamedTuple):
    """What one kill led to."""

    side: str
    after: float  # seconds of traffic
    noticed: float  # seconds until the survivor was rid of it
    lost: int  # loads that failed, or leases that had to be given back
    fetched: int  # blocks that had been sent by then


class _Killer(threading.Thread):
    """Kills a child after so many seconds, and remembers when that was."""

    def __init__(self, child: subprocess.Popen, after: float) -> None:
        super().__init__(daemon=True)
        self.child, self.after, self.at = child, after, float("inf")
        self.start()

    def run(self) -> None:
        time.sleep(self.after)
        self.at = time.monotonic()
        self.child.kill()

    def assert_in_time(self) -> None:
        assert time.monotonic() < self.at + DEADLINE + SLACK, "the survivor has not noticed"


def kill_prefill(count: int, seed: int, cache_dir: pathlib.Path) -> list[Kill]:
    """Kill the prefill process under a decode instance in this one, so many times."""
    kills = []
    for number in range(count):
        with process_to_kill("prefill", TOKEN, cache_dir=cache_dir) as (child, keep):
            on_failure = ("recompute", "fail")[number % 2]
            kills.append(kill_this_prefill(child, keep, first_line(child), on_failure, (seed, number)))
    return kills


def kill_this_prefill(
    child: subprocess.Popen, keep: Callable[[], None], address: str, on_failure: OnFailure, seed: tuple[int, int]
) -> Kill:
    """Kill a prefill process that serves at ``address``; child and ``keep`` are of ``process_to_kill``."""
    rng, after = np.random.default_rng(seed), random.Random(sum(seed)).uniform(0.0, _LONGEST)
    decode = connected(shared_engine("decode"), address, on_failure=on_failure)
    _assert_answers(decode, rng)
    assert decode.link.is_open
    keep()
    killer = _Killer(child, after)
    entries, prompts, noticed = _traffic_until_an_error(decode, rng, killer)
    for entry in entries:
        assert isinstance(entry.transfer_error, TransferError | None)
        assert entry.failed == (entry.transfer_error is not None and decode.on_failure == "fail")
    _assert_all_back(decode.manager)
    answered = [i for i, entry in enumerate(entries) if not entry.failed]
    _assert_tokens(decode.engine, [prompts[i] for i in answered], [entries[i].token_ids for i in answered])
    decode.on_failure = "recompute"
    _assert_answers(decode, rng)
    decode.close()
    _assert_all_back(decode.manager)
    lost = sum(entry.transfer_error is not None for entry in entries)
    return Kill("prefill", killer.after, noticed, lost, sum(entry.num_fetched for entry in entries))


def _traffic_until_an_error(
    decode: DecodeInstance, rng: np.random.Generator, killer: _Killer
) -> tuple[list[HandoffRequest], list[list[int]], float]:
    """(requests, their prompts, seconds from the kill to the first error)."""
    entries: list[HandoffRequest] = []
    prompts: list[list[int]] = []
    noticed = None
    while noticed is None:
        batch = new_prompts(rng)
        new = [decode.submit(prompt, ANSWER) for prompt in batch]
        entries, prompts = entries + new, prompts + batch
        while decode.has_unfinished:
            decode.step()
            if noticed is None and any(entry.transfer_error for entry in new):
                noticed = time.monotonic() - killer.at
            killer.assert_in_time()
    return entries, prompts, noticed


def kill_decode(count: int, seed: int, cache_dir: pathlib.Path) -> list[Kill]:
    """Kill decode processes that ask a prefill instance in this one, so many times."""
    engine, moments = shared_engine("decode"), random.Random(seed)
    server = PrefillServer(shared_engine("prefill"), NAME, TOKEN, timeouts=TIMEOUTS)
    kills = []

    def serve_until(done: Callable[[], bool]) -> None:
        server.serve(until=done)

    try:
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            with process_to_kill("decode", TOKEN, server.address, cache_dir=cache_dir) as (child, keep):
                ready: list[str] = []
                waiting = threading.Thread(target=lambda to=ready, of=child: to.append(first_line(of)), daemon=True)
                waiting.start()
                serve_until(_within(_STARTING, lambda to=ready: bool(to)))
                keep()
                read = server.instance.stats.num_blocks_read
                killer = _Killer(child, moments.uniform(0.0, _LONGEST))
                serve_until(lambda of=killer: time.monotonic() > of.at)
                kept = len(server.instance.leases) + server.instance.num_under_way

                def rid(of: _Killer = killer) -> bool:
                    of.assert_in_time()
                    return not (server.instance.leases or server.instance.num_under_way or server.instance.num_staged)

                serve_until(rid)
                noticed = time.monotonic() - killer.at
            _assert_all_back(server.instance.manager)
            stop = threading.Event()
            serving = threading.Thread(target=serve_until, args=(stop.is_set,), daemon=True)
            serving.start()
            decode = connected(engine, server.address, on_failure="fail")
            _assert_answers(decode, rng)
            decode.close()
            _assert_all_back(decode.manager)
            stop.set()
            serving.join()
            serve_until(rid)
            _assert_all_back(server.instance.manager)
            kills.append(Kill("decode", killer.after, noticed, kept, server.instance.stats.num_blocks_read - read))
    finally:
        server.close()
    return kills


def _within(seconds: float, done: Callable[[], bool]) -> Callable[[], bool]:
    """``done``, which fails when it has been False for so long."""
    deadline = time.monotonic() + seconds

    def is_done() -> bool:
        assert time.monotonic() < deadline, f"not within {seconds} s"
        return done()

    return is_done


def _assert_answers(decode: DecodeInstance, rng: np.random.Generator) -> None:
    """It serves, and its tokens are those of a single instance."""
    prompts = new_prompts(rng)
    entries = decode.generate(prompts, ANSWER)
    assert not any(entry.failed for entry in entries), [entry.transfer_error for entry in entries]
    _assert_tokens(decode.engine, prompts, [entry.token_ids for entry in entries])


def _assert_tokens(engine: Engine, prompts: list[list[int]], tokens: list[list[int]]) -> None:
    """They are those that the engine computes when nothing is cached."""
    assert tokens == alone(engine, prompts)


def _assert_all_back(manager: KVCacheManager) -> None:
    manager.check_invariants()
    assert manager.holds() == []
    assert manager.request_ids() == []
    assert manager.get_num_free_blocks() == NUM_BLOCKS
