"""Leases with a clock of the test's own."""

from __future__ import annotations

import pytest

from pyagent_kv_jax import InvalidArgumentError
from pyagent_kv_jax.distributed.handoff.leases import LeaseBook
from pyagent_kv_jax.errors import TransferError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def book():
    clock, back = Clock(), []
    book = LeaseBook(back.append, seconds=10.0, most=3, clock=clock)
    book.clock, book.back = clock, back
    return book


def test_each_end_gives_back_once(book):
    fetched, of_dead, expired = (book.open(peer, hold) for peer, hold in (("a", "h0"), ("b", "h1"), ("a", "h2")))
    assert book.end(fetched.lease_id)
    assert not book.end(fetched.lease_id)
    assert book.end_those_of("b") == [of_dead.lease_id]
    assert book.end_those_of("b") == []
    book.clock.now += 10.0
    assert book.expire() == [expired.lease_id]
    assert book.expire() == []
    assert book.back == ["h0", "h1", "h2"]
    assert len(book) == 0
    assert book.num_expired == 1


def test_use_makes_it_last(book):
    lease = book.open("a", "h")
    book.clock.now += 9.0
    assert book.use(lease.lease_id, "a").hold_id == "h"
    book.clock.now += 9.0
    assert book.expire() == []
    book.clock.now += 1.0
    with pytest.raises(TransferError, match=lease.lease_id):
        book.use(lease.lease_id, "a")  # before anybody called expire
    assert book.expire() == [lease.lease_id]
    assert book.back == ["h"]


def test_a_lease_is_one_peers_own(book):
    lease = book.open("a", "h")
    with pytest.raises(TransferError, match="not open"):
        book.use(lease.lease_id, "b")
    with pytest.raises(TransferError, match="not open"):
        book.use("lease:77", "a")
    assert book.back == []


def test_most(book):
    for hold in "123":
        book.open("a", hold)
    with pytest.raises(TransferError, match="3 open"):
        book.open("a", "4")
    assert book.end_all() == ["lease:0", "lease:1", "lease:2"]
    assert book.back == ["1", "2", "3"]
    assert book.open("a", "4").lease_id == "lease:3"


@pytest.mark.parametrize(("seconds", "most"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0)])
def test_bad_sizes(seconds, most):
    with pytest.raises(InvalidArgumentError, match="positive"):
        LeaseBook(print, seconds, most)
