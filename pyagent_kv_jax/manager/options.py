"""What a manager can be told besides the sizes of its cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from pyagent_kv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PreemptionCost:
    """What ``KVCacheManager.preempt`` weighs when it chooses between swapping and computing again.

    Attributes:
        prefill_tokens_per_second: how fast lost tokens are computed again.
        swap_bytes_per_second: how fast blocks go to the host, and come back.
    """

    prefill_tokens_per_second: float = 20_000.0
    swap_bytes_per_second: float = 20e9

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not value > 0 or math.isinf(value):
                raise ConfigError(f"PreemptionCost.{field.name}: got {value!r}, want a positive number")

    def prefers_swap(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether moving ``num_bytes`` out and in again is quicker than computing ``num_tokens``."""
        return 2 * num_bytes / self.swap_bytes_per_second < num_tokens / self.prefill_tokens_per_second


@dataclasses.dataclass(frozen=True)
class ManagerOptions:
    """Switches of a ``KVCacheManager``.

    Attributes:
        prefix_caching: keep the content of full blocks whose tokens are known, for other requests that begin alike.
        hash_algorithm: "sha256", "xxh3_128" (needs the package xxhash), or a function from bytes to bytes. Where equal
            hashes are no proof of equal content, content is compared.
        hit_rate_window: requests that the recent hit rate covers.
        num_host_blocks: blocks of the host pool that preempted requests are swapped to. 0: none.
        preemption_cost: what decides between swapping and computing again.
        zero_on_free: overwrite with zeros what a block held before, ahead of its next holder.
        event_capacity: unread events kept for ``KVCacheManager.events``. 0: no events.
        prediction_horizon: decode steps that blocks are reserved for ahead, as far as requests are expected to go on,
            so that a step within them needs no call of the control plane. Reserved blocks count as free, and are given
            back before anybody is refused. 0: none.
        callback_timeout: seconds a memory-pressure callback may take before the manager goes on without it.

    Raises:
        ConfigError: a negative count, or a timeout that is not positive.
    """

    prefix_caching: bool = True
    hash_algorithm: str | Callable[[bytes], bytes] = "sha256"
    hit_rate_window: int = 1000
    num_host_blocks: int = 0
    preemption_cost: PreemptionCost = PreemptionCost()
    zero_on_free: bool = False
    event_capacity: int = 0
    prediction_horizon: int = 0
    callback_timeout: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_host_blocks", "event_capacity", "prediction_horizon"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"ManagerOptions.{name}: got {value!r}, want an integer of at least 0")
        if not self.callback_timeout > 0:
            raise ConfigError(f"ManagerOptions.callback_timeout: got {self.callback_timeout!r}, want a positive number")


DEFAULT_OPTIONS = ManagerOptions()
