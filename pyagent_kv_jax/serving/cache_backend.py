"""What the engine asks of a cache, so that it can serve through a paged one or a dense one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.manager.step_plan import StepPlan


class CacheBackend(Protocol):
    """Hands out cache memory by request id. ``KVCacheManager`` is one, ``DenseCacheManager`` another.

    Attributes:
        config: sizes.
        pages: a pytree with ``attend`` (see ``LayerCache``), donated to each step and assigned back.
    """

    config: KVCacheConfig

    @property
    def pages(self) -> Any: ...

    @pages.setter
    def pages(self, pages: Any) -> None: ...

    def step(
        self,
        request_ids: Sequence[str],
        num_new_tokens: Any,
        *,
        free: Iterable[str] = (),
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> StepPlan:
        """Free, admit, append and compute slots for a whole batch; see ``KVCacheManager.step``."""
        ...

    def free(self, request_id: str) -> None:
        """Give back all a request holds; ``UnknownRequestError`` if it is not here."""
        ...

    def get_num_free_blocks(self) -> int:
        """Blocks that could be handed out now."""
        ...
