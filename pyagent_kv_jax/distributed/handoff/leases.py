"""What a prefill instance keeps for others, and until when."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable

from pyagent_kv_jax.errors import InvalidArgumentError, TransferError


@dataclasses.dataclass(frozen=True)
class Lease:
    """Blocks kept for one peer until it has fetched them.

    Attributes:
        lease_id: never used again.
        peer: who may fetch them.
        hold_id: what keeps the blocks (see ``PrefixHold``).
        deadline: by the book's clock, in seconds.
    """

    lease_id: str
    peer: str
    hold_id: str
    deadline: float


class LeaseBook:
    """All open leases. Whatever ends one calls ``give_back(hold_id)`` exactly once. Not thread-safe.

    >>> book = LeaseBook(give_back=print, seconds=30.0, most=8, clock=lambda: 0.0)
    >>> book.end(book.open("a peer", "hold 1").lease_id)
    hold 1
    True
    """

    def __init__(
        self,
        give_back: Callable[[str], object],
        seconds: float,
        most: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty book.

        Args:
            give_back: what is done with the hold of a lease that ends.
            seconds: that a lease lasts from its last use.
            most: open leases at a time.
            clock: in seconds; never runs backwards.

        Raises:
            InvalidArgumentError: not positive.
        """
        if not seconds > 0 or most < 1:
            raise InvalidArgumentError(f"got leases of {seconds} s, {most} at a time, want positive numbers")
        self.seconds = seconds
        self.most = most
        self.num_expired = 0
        self._give_back = give_back
        self._clock = clock
        self._numbers = itertools.count()
        self._open: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, peer: str, hold_id: str) -> Lease:
        """Keep ``hold_id`` for ``peer`` from now on.

        Raises:
            TransferError: there are ``most`` already; the hold stays the caller's.
        """
        if len(self._open) >= self.most:
            raise TransferError(f"leases: got one more than {self.most} open ones, want some fetched or released first")
        lease = Lease(f"lease:{next(self._numbers)}", peer, hold_id, self._clock() + self.seconds)
        self._open[lease.lease_id] = lease
        return lease

    def use(self, lease_id: str, peer: str) -> Lease:
        """The lease, whose time begins anew.

        Raises:
            TransferError: it has ended, or is another peer's.
        """
        lease = self._open.get(lease_id)
        if lease is None or lease.peer != peer or lease.deadline <= self._clock():
            raise TransferError(f"lease {lease_id!r}: is not open here, want one that was neither released nor expired")
        self._open[lease_id] = dataclasses.replace(lease, deadline=self._clock() + self.seconds)
        return self._open[lease_id]

    def end(self, lease_id: str) -> bool:
        """Give back what was fetched or is not wanted any more; whether the lease was open."""
        lease = self._open.pop(lease_id, None)
        if lease is not None:
            self._give_back(lease.hold_id)
        return lease is not None

    def end_those_of(self, peer: str) -> list[str]:
        """End all leases of a peer that is gone; their ids."""
        return self._end(lease for lease in self._open.values() if lease.peer == peer)

    def expire(self) -> list[str]:
        """End those whose time has run out; their ids."""
        now = self._clock()
        expired = self._end(lease for lease in self._open.values() if lease.deadline <= now)
        self.num_expired += len(expired)
        return expired

    def end_all(self) -> list[str]:
        """End all; their ids."""
        return self._end(self._open.values())

    def _end(self, leases: Iterable[Lease]) -> list[str]:
        ended = [lease.lease_id for lease in list(leases)]
        for lease_id in ended:
            self.end(lease_id)
        return ended
