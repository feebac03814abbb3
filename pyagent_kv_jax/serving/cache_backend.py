"""What the engine asks of a cache, so that it can serve through a paged one or a dense one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.manager.step_plan import AdmissionPreview, StepPlan


class CacheBackend(Protocol):
    """Hands out cache memory by request id. ``KVCacheManager`` is one, ``DenseCacheManager`` another.

    Attributes:
        config: sizes.
        can_fork: whether ``fork`` works; without it, samples of one prompt are requests like any others.
        sharding: how the cache lies on a mesh; None: on one device.
        pages: a pytree with ``attend`` (see ``LayerCache``), donated to each step and assigned back.
    """

    config: KVCacheConfig
    can_fork: bool
    sharding: CacheSharding | None

    @property
    def pages(self) -> Any:
        """K and V; to be given back by the step that donates them."""
        ...

    @pages.setter
    def pages(self, pages: Any) -> None: ...

    def add_request(self, request_id: str, tokens: Any) -> None:
        """Tell the tokens of a request to come."""
        ...

    def record_tokens(self, request_ids: Sequence[str], tokens: Any) -> None:
        """Tell the token each request has chosen, before the step that computes it."""
        ...

    def preview(self, request_id: str) -> AdmissionPreview:
        """What admitting all known tokens of a request would take now."""
        ...

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

    def fork(self, parent: str, child: str) -> None:
        """Make ``child`` a request with all tokens of ``parent``."""
        ...

    def preempt(
        self, request_ids: Sequence[str], mode: Literal["auto", "swap", "recompute"] = "auto"
    ) -> dict[str, str]:
        """Take the blocks of requests away until a step names them again; "swap" or "recompute" for each."""
        ...

    def free(self, request_id: str) -> None:
        """Give back all a request holds and forget it; ``UnknownRequestError`` if it is not here."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget the content that is kept for requests to come."""
        ...

    def warm_up(self, num_rows: int, num_tokens: int | None = None) -> None:
        """Compile what steps padded to these sizes run."""
        ...

    def get_num_free_blocks(self) -> int:
        """Blocks that could be handed out now."""
        ...
