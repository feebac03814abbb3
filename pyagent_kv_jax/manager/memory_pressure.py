"""Telling the world outside that blocks are short, whatever the world does with it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from pyagent_kv_jax.errors import CallbackError, InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class MemoryPressure:
    """What a memory-pressure callback is told.

    Attributes:
        request_ids: requests that were refused for lack of blocks, most urgent first; empty where a threshold was
            crossed and nobody has been refused.
        num_blocks_needed: blocks that would have served them.
        num_blocks_free: blocks free now.
        usage: share of the pool that requests hold, 0.0 to 1.0.
        frees: request id -> blocks that would be free if it alone were let go, most first; shared blocks don't count.
    """

    request_ids: tuple[str, ...]
    num_blocks_needed: int
    num_blocks_free: int
    usage: float = dataclasses.field(default=0.0, compare=False)
    frees: dict[str, int] = dataclasses.field(default_factory=dict, compare=False)


PressureCallback = Callable[[MemoryPressure], None]


@dataclasses.dataclass(eq=False)
class _Subscription:
    callback: PressureCallback
    threshold: float | None  # None: when a request is refused
    is_above: bool = False
    running: threading.Thread | None = None


class PressureCallbacks:
    """Runs callbacks outside every lock, each in a thread of its own, and waits for it only so long.

    So a callback may call the manager; one that raises is reported; one that does not return is left behind, reported,
    and not called again before it has returned.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._subscriptions: list[_Subscription] = []
        self.has_thresholds = False

    def add(self, callback: PressureCallback, threshold: float | None) -> None:
        """Call back on refusal, or when usage rises to ``threshold``.

        Raises:
            InvalidArgumentError: not callable, or a threshold outside (0, 1].
        """
        if not callable(callback):
            raise InvalidArgumentError(f"callback: got {callback!r}, want a function of one MemoryPressure")
        if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold <= 1):
            raise InvalidArgumentError(f"threshold: got {threshold!r}, want 0 < threshold <= 1, or None")
        self._subscriptions.append(_Subscription(callback, threshold))
        self.has_thresholds |= threshold is not None

    def due(self, usage: float, refused: bool) -> list[_Subscription]:
        """Whom to call. A threshold is due when usage rises to it, and again only after it fell below."""
        due = []
        for each in self._subscriptions:
            if each.threshold is None:
                if refused:
                    due.append(each)
                continue
            was_above, each.is_above = each.is_above, usage >= each.threshold
            if each.is_above and not was_above:
                due.append(each)
        return due

    def call(self, due: list[_Subscription], pressure: MemoryPressure) -> tuple[CallbackError, ...]:
        """Run them one after another; what went wrong."""
        return tuple(error for each in due if (error := self._call(each, pressure)) is not None)

    def _call(self, subscription: _Subscription, pressure: MemoryPressure) -> CallbackError | None:
        callback, raised = subscription.callback, []

        def run() -> None:
            try:
                callback(pressure)
            except Exception as error:
                raised.append(error)

        if subscription.running is not None and subscription.running.is_alive():
            return CallbackError(f"memory-pressure callback {callback!r}: still busy with an earlier call, not called")
        subscription.running = threading.Thread(target=run, daemon=True, name="memory-pressure")
        subscription.running.start()
        subscription.running.join(self._timeout)
        if raised:
            error = CallbackError(f"memory-pressure callback {callback!r} raised {raised[0]!r}")
            error.__cause__ = raised[0]
            return error
        if subscription.running.is_alive():
            return CallbackError(
                f"memory-pressure callback {callback!r}: did not return within {self._timeout} s, going on without it"
            )
        return None
