"""Which request has which row of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pyagent_kv_jax.errors import DuplicateRequestError, TooManyRequestsError, UnknownRequestError


class RequestRows:
    """Request ids and the rows they hold. Not thread-safe: the manager's lock is above it."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._rows: dict[str, int] = {}
        self._unused = list(range(num_rows - 1, -1, -1))
        self._batch: tuple[tuple[str, ...], np.ndarray] = ((), np.zeros(0, np.int32))  # the last one looked up

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_unused(self) -> int:
        """Rows that a new request could take."""
        return len(self._unused)

    def ids(self) -> list[str]:
        """Ids that hold a row, in the order they came."""
        return list(self._rows)

    def row_of(self, request_id: str) -> int:
        """The row of a request.

        Raises:
            UnknownRequestError: it has none.
        """
        try:
            return self._rows[request_id]
        except (KeyError, TypeError):
            raise UnknownRequestError(
                f"request {request_id!r}: unknown, want one of the {len(self._rows)} that hold blocks"
            ) from None

    def rows_of(self, ids: tuple[str, ...]) -> np.ndarray:
        """i32[n]; -1 for those that hold no row. The last batch is remembered: decode steps ask for it again.

        Raises:
            DuplicateRequestError: an id named twice.
        """
        if ids != self._batch[0]:
            check_distinct(ids)
            get = self._rows.get
            self._batch = ids, np.array([get(i, -1) for i in ids], np.int32)
        return self._batch[1]

    def choose(self, new: Sequence[str], freed_rows: Sequence[int]) -> list[int]:
        """Rows for ``new`` ids, from the unused and the about-to-be-freed; nothing changes yet.

        Raises:
            TooManyRequestsError: too few.
        """
        unused = [*freed_rows, *self._unused]
        if len(new) > len(unused):
            raise TooManyRequestsError(
                f"{len(new)} new requests with {len(unused)} of {self.num_rows} rows unused: "
                f"free some, or raise max_num_reqs"
            )
        return unused[len(unused) - len(new) :][::-1]

    def take(self, taken: dict[str, int]) -> None:
        """``taken`` ids hold these unused rows from now on."""
        if taken:
            rows = set(taken.values())
            self._rows.update(taken)
            self._unused = [row for row in self._unused if row not in rows]
            self._batch = (), np.zeros(0, np.int32)

    def give_up(self, ids: Iterable[str]) -> None:
        """The rows of ``ids`` are unused from now on."""
        freed = [self._rows.pop(request_id) for request_id in ids]
        if freed:
            self._unused.extend(freed)
            self._batch = (), np.zeros(0, np.int32)


def check_distinct(ids: Sequence[str]) -> None:
    """Raise ``DuplicateRequestError`` where an id is named twice."""
    if len(set(ids)) != len(ids):
        twice = next(request_id for request_id in ids if ids.count(request_id) > 1)
        raise DuplicateRequestError(f"request {twice!r}: named twice in one step, want each id once")
