"""What can be read from a ``KVCacheManager`` without changing anything."""

from __future__ import annotations

import threading

from pyagent_kv_jax.arguments import integer, layer_index
from pyagent_kv_jax.cache.block_views import BlockInfo, KVCacheBlocks
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import (
    InvalidBlockError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.admission import token_counts
from pyagent_kv_jax.manager.manager_display import ShowsItself
from pyagent_kv_jax.manager.manager_snapshot import ManagerSnapshot, snapshot_of
from pyagent_kv_jax.manager.manager_state import ManagerState
from pyagent_kv_jax.manager.manager_stats import ManagerStats
from pyagent_kv_jax.manager.prefix.events import EventLog
from pyagent_kv_jax.manager.prefix.prefix_cache import PrefixHit
from pyagent_kv_jax.manager.step_plan import AdmissionPreview


class ManagerViews(ShowsItself):
    """The reading half of ``KVCacheManager``; each answer is of one moment, under its lock."""

    config: KVCacheConfig
    _lock: threading.RLock
    _state: ManagerState

    # -- the prefix cache --------------------------------------------------------------------------------------

    def lookup_prefix(self, request_id: str) -> PrefixHit:
        """What the prefix cache holds now for a request that was added and holds no blocks; changes nothing.

        Never the whole prompt: its last token is always computed.

        Raises:
            UnknownRequestError: not such a request.
        """
        with self._lock:
            record = self._state.waiting.get(request_id)
            if record is None:
                raise UnknownRequestError(f"request {request_id!r}: want one that was added and holds no blocks")
            return self._state.hit_of(request_id)

    def preview(self, request_id: str) -> AdmissionPreview:
        """What admitting all known tokens of a request would take now; changes nothing.

        For one that was added, preempted to be computed again, or swapped out.

        Raises:
            UnknownRequestError: it is not here, or holds blocks.
        """
        with self._lock:
            return self._state.preview(request_id)

    @property
    def minimum_reusable_length(self) -> int:
        """Tokens the shortest prompt must have for any of it to be found in the prefix cache."""
        return self._state.prefixes.minimum_reusable_length

    @property
    def events(self) -> EventLog:
        """What happened to cached blocks; off unless ``ManagerOptions.event_capacity`` says otherwise."""
        return self._state.events

    # -- blocks and requests -----------------------------------------------------------------------------------

    def get_block_table(self, request_id: str, layer_idx: int = 0) -> list[int]:
        """Block ids of a request, first token's block first; -1 where no later token can see the block any more.

        Args:
            request_id: of a request that holds blocks.
            layer_idx: selects the layer's group; a block spans the layers of its group.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
            InvalidArgumentError: no such layer.
        """
        group = self._group_of(layer_idx)
        with self._lock:
            return self._state.blocks_of_row(self._state.rows.row_of(request_id))[group].tolist()

    def blocks(self, request_id: str, layer_idx: int = 0) -> KVCacheBlocks:
        """The blocks a request holds now, in the order of its tokens: of the device, or of the host while swapped out.

        Unlike ``get_block_table`` it leaves out the places whose block was given back.

        Args:
            request_id: of a request that holds blocks, here or there.
            layer_idx: selects the layer's group.

        Raises:
            UnknownRequestError, InvalidArgumentError: as ``get_block_table``.
        """
        group = self._group_of(layer_idx)
        with self._lock:
            on_device, on_host = self._state.blocks_of(request_id)
        return KVCacheBlocks(*(tuple(ids[ids >= 0].tolist()) for ids in (on_device[group], on_host[group])))

    def block_info(self, block_id: int) -> BlockInfo:
        """A block of the device's pool, and how many requests hold it now.

        Raises:
            InvalidBlockError: no block of the pool.
            InvalidArgumentError: not an integer.
        """
        block, size = int(integer("block_id", block_id)), self.config.pool_blocks
        if not 0 <= block < size:
            raise InvalidBlockError(f"block_id: got {block}, want 0 to {size - 1}")
        with self._lock:
            references = int(self._state.control.ref_counts()[block])
        return BlockInfo(block, references, self.config.device_type)

    def num_tokens(self, request_id: str) -> int:
        """Tokens the request holds.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
        """
        with self._lock:
            return int(self._state.control.lengths()[self._state.rows.row_of(request_id)])

    def request_ids(self) -> list[str]:
        """Ids of all requests that hold blocks, in the order they came."""
        with self._lock:
            return self._state.rows.ids()

    def swapped_ids(self) -> list[str]:
        """Ids of all requests that wait in host memory."""
        with self._lock:
            return list(self._state.swap.requests)

    def get_num_free_blocks(self) -> int:
        """Blocks that an admission could take now, those with cached content included."""
        with self._lock:
            return self._state.num_free()

    def usage(self) -> float:
        """Share of the pool's blocks that requests hold, 0.0 to 1.0."""
        return 1.0 - self.get_num_free_blocks() / self.config.pool_blocks

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether a new request of ``num_tokens`` would be admitted now, without any help of the prefix cache.

        Raises:
            InvalidArgumentError: ``num_tokens`` is negative or not an integer.
        """
        tokens = int(token_counts([num_tokens], 1)[0])
        with self._lock:
            fits = tokens <= self.config.max_model_len and self._state.blocks_for(tokens) <= self._state.num_free()
            return fits and self._state.rows.num_unused > 0

    def stats(self) -> ManagerStats:
        """A snapshot of counts: blocks, requests, hit rates, preemptions, waste."""
        with self._lock:
            return self._state.stats()

    def snapshot(self) -> ManagerSnapshot:
        """Who holds which block and what the prefix cache knows, all of one moment; costs O(pool)."""
        with self._lock:
            return snapshot_of(self._state)

    def check_invariants(self) -> None:
        """Check pool, tables and prefix cache against each other; costs O(pool).

        Raises:
            InvalidBlockError: they contradict themselves or each other; the message lists where.
        """
        with self._lock:
            self._state.check_invariants()

    def _group_of(self, layer_idx: int) -> int:
        return self.config.group_of(layer_index(layer_idx, self.config.num_layers, "layer_idx"))
