"""The arguments of a step, checked before anything changes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from pyagent_kv_jax.errors import InvalidArgumentError


class Batch(NamedTuple):
    """What a step is asked for.

    Attributes:
        ids: n requests, most urgent first.
        counts: i64[n], tokens each wants.
        freed: requests to let go.
        num_rows: rows the batch is padded to.
        num_tokens: tokens it is padded to; None: decode layout.
    """

    ids: tuple[str, ...]
    counts: np.ndarray
    freed: tuple[str, ...]
    num_rows: int
    num_tokens: int | None

    @classmethod
    def of(
        cls,
        request_ids: Sequence[str],
        num_new_tokens: ArrayLike,
        free: Iterable[str],
        num_rows: int | None,
        num_tokens: int | None,
    ) -> Self:
        """Check what can be checked without knowing the requests.

        Raises:
            InvalidArgumentError: counts that are none, or more rows than the padding.
        """
        ids, freed = tuple(request_ids), tuple(free)
        counts = token_counts(num_new_tokens, len(ids))
        padded = len(ids) if num_rows is None else num_rows
        if len(ids) > padded:
            raise InvalidArgumentError(f"num_rows: got {padded} for {len(ids)} requests, want at least as many")
        return cls(ids, counts, freed, padded, num_tokens)

    def check_fit(self, counts: np.ndarray) -> None:
        """Raise ``InvalidArgumentError`` where ``counts`` i64[n], the tokens to be computed, exceed the padding."""
        if self.num_tokens is None:
            if counts.max(initial=0) > 1:
                raise InvalidArgumentError(
                    f"num_new_tokens: got {counts.max()} in decode layout, want at most 1 a request, or num_tokens=..."
                )
        elif counts.sum() > self.num_tokens:
            raise InvalidArgumentError(
                f"num_tokens: got {self.num_tokens} for {counts.sum()} tokens, want at least as many"
            )


def token_counts(values: ArrayLike, n: int) -> np.ndarray:
    """``values`` as i64[n] counts.

    Raises:
        InvalidArgumentError: negative, not integers, or not n of them.
    """
    array = np.asarray(values)
    if array.size == 0 and n == 0:
        return np.zeros(0, np.int64)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"token counts: got {_shown(values)}, want {n} integers of at least 0")
    if array.min() < 0:
        raise InvalidArgumentError(f"token counts: got {array[array < 0][0]}, want integers of at least 0")
    return array.astype(np.int64)


def token_ids(values: ArrayLike) -> np.ndarray:
    """``values`` as i32[n] token ids.

    Raises:
        InvalidArgumentError: not a flat sequence of integers from 0 to 2**31 - 1.
    """
    try:
        array = np.atleast_1d(np.asarray(values))
    except ValueError as error:  # ragged nesting
        raise InvalidArgumentError(f"tokens: got {_shown(values)}, want a flat sequence of integers") from error
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise InvalidArgumentError(f"tokens: got {_shown(values)}, want a flat sequence of integers")
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise InvalidArgumentError(f"tokens: got {array.min()} to {array.max()}, want integers from 0 to {2**31 - 1}")
    return array.astype(np.int32)


def _shown(values: object) -> str:
    return repr(values) if isinstance(values, numbers.Number) else repr(values)[:80]
