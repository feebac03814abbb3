"""How much of the prompts the prefix cache served."""

from __future__ import annotations

from collections import deque

from pyagent_kv_jax.errors import InvalidArgumentError


class PrefixStatistics:
    """Hit rate by tokens, over all time and over the last ``window`` requests.

    By tokens, since that is the work saved: a hit of one block in a long prompt is not half as good as a miss is bad.
    Record a request once, when it is first admitted: one that finds its own blocks after a preemption is no hit.
    """

    def __init__(self, window: int = 1000) -> None:
        if not isinstance(window, int) or window < 1:
            raise InvalidArgumentError(f"window: got {window!r}, want an integer of at least 1")
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        self.num_requests = 0
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._recent: deque[tuple[int, int]] = deque()
        self._recent_queried = 0
        self._recent_hit = 0

    def record(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count one request: ``hit_tokens`` of its ``queried_tokens`` prompt tokens were cached.

        Raises:
            InvalidArgumentError: a negative count, or more hits than queries.
        """
        if not 0 <= hit_tokens <= queried_tokens:
            raise InvalidArgumentError(
                f"got {hit_tokens} hit of {queried_tokens} queried tokens, want 0 <= hit <= queried"
            )
        self.num_requests += 1
        self.queried_tokens += queried_tokens
        self.hit_tokens += hit_tokens
        if len(self._recent) == self.window:
            queried, hit = self._recent.popleft()
            self._recent_queried -= queried
            self._recent_hit -= hit
        self._recent.append((queried_tokens, hit_tokens))
        self._recent_queried += queried_tokens
        self._recent_hit += hit_tokens

    @property
    def hit_rate(self) -> float:
        """Hit tokens by queried tokens since the last reset; 0.0 before any query."""
        return _rate(self.hit_tokens, self.queried_tokens)

    @property
    def recent_hit_rate(self) -> float:
        """The same over the last ``window`` requests."""
        return _rate(self._recent_hit, self._recent_queried)

    @property
    def num_recent_requests(self) -> int:
        """Requests that ``recent_hit_rate`` covers."""
        return len(self._recent)


def _rate(hit: int, queried: int) -> float:
    return hit / queried if queried else 0.0
