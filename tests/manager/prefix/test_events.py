"""The bounded event log: order, drops, and one writer beside one reader."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.manager.prefix.events import AllBlocksCleared, BlockRemoved, BlocksSwapped, BlockStored, EventLog


def event(number: int) -> BlocksSwapped:
    return BlocksSwapped("request", "out", number)


@given(st.integers(0, 4), st.lists(st.none() | st.integers()))
def test_the_log_keeps_the_newest_and_counts_the_rest(capacity: int, actions: list[int | None]) -> None:
    log, unread, dropped = EventLog(capacity), [], 0
    for action in [*actions, None]:
        if action is None:
            assert log.drain() == unread
            unread = []
        else:
            log.append(event(action))
            unread.append(event(action))
            if len(unread) > capacity:
                unread.pop(0)
                dropped += capacity > 0
        assert len(log) == len(unread)
        assert log.num_dropped == dropped


def test_capacity_0_is_off() -> None:
    log = EventLog(0)
    assert not log.enabled
    log.append(AllBlocksCleared())
    assert log.drain() == []
    assert log.num_dropped == 0
    assert EventLog(1).enabled


def test_nothing_is_lost_or_seen_twice_between_a_writer_and_a_reader() -> None:
    log, total, seen = EventLog(50), 20_000, []
    done = threading.Event()

    def write() -> None:
        for number in range(total):
            log.append(event(number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen += log.drain()
    writer.join()
    seen += log.drain()
    numbers = [entry.num_blocks for entry in seen]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + log.num_dropped == total
    assert numbers[-1] == total - 1


@pytest.mark.parametrize("call", [EventLog.drain, lambda log: log.append(event(2))], ids=["reader", "writer"])
def test_each_side_waits_for_the_other(call) -> None:
    log = EventLog(1)
    log.append(event(1))
    with log._lock:
        other = threading.Thread(target=call, args=(log,))
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert len(log) == 1
        assert log.num_dropped == 0
    other.join()


def test_events_are_values() -> None:
    stored = BlockStored(1, (4, 5), (b"a", b"b"), None, ("lora", "/path"))
    assert stored == dataclasses.replace(stored)
    assert len({stored, BlockRemoved(1, (4,), (b"a",)), AllBlocksCleared(), AllBlocksCleared()}) == 3
    assert BlockStored(0, (1,), (b"k",), b"p").adapter is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.group = 2


@pytest.mark.parametrize("capacity", [-1, 1.5])
def test_capacities_that_make_no_sense(capacity) -> None:
    with pytest.raises(InvalidArgumentError, match="capacity"):
        EventLog(capacity)
