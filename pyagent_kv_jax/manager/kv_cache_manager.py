"""``KVCacheManager``: request ids, prefix cache, swap space and callbacks around one pool and its tables.

The pool and the tables are pytrees on the host's XLA CPU device; a step is one jitted dispatch over them, donated
under the lock. The manager adds what arrays cannot hold (ids, block keys, callbacks, events), and no second record of
who owns which block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from pyagent_kv_jax.cache.kv_pages import KVPages, PageMove
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.sharded_kv_pages import ShardedKVPages
from pyagent_kv_jax.errors import (
    CallbackError,
    ConfigError,
    DuplicateRequestError,
    InvalidArgumentError,
    OutOfBlocksError,
)
from pyagent_kv_jax.manager.admission import Batch, token_counts, token_ids
from pyagent_kv_jax.manager.block_import import BlockHolds, HoldsPrefixes
from pyagent_kv_jax.manager.block_size_adaptation import BlockSizeChooser
from pyagent_kv_jax.manager.block_size_switch import BlockSizeReport
from pyagent_kv_jax.manager.defragmentation import DefragmentationReport
from pyagent_kv_jax.manager.manager_state import ManagerState
from pyagent_kv_jax.manager.manager_views import ManagerViews
from pyagent_kv_jax.manager.memory_pressure import PressureCallback, PressureCallbacks
from pyagent_kv_jax.manager.options import DEFAULT_OPTIONS, ManagerOptions
from pyagent_kv_jax.manager.prefix.block_hash import NO_EXTRAS, CacheExtras
from pyagent_kv_jax.manager.step_plan import StepPlan

PreemptionMode = Literal["auto", "swap", "recompute"]


class KVCacheManager(ManagerViews, HoldsPrefixes):
    """Hands out blocks of a paged KV cache to requests named by strings. Thread-safe.

    >>> manager = KVCacheManager(KVCacheConfig(num_layers=2, num_heads=2, head_dim=8, num_blocks=64))
    >>> manager.allocate("a", 40)                           # three blocks of 16 tokens
    >>> plan = manager.step(["a", "b"], [1, 100], num_tokens=128)   # one decode token, one prefill, one dispatch

    Told a request's tokens (``add_request``, ``record_tokens``), it keeps the content of full blocks and gives it to
    later requests that begin alike.

    Source: behaves as the manager of vLLM v1 (Kwon et al., SOSP 2023) where that has one, with a whole scheduler step
    in one call.
    """

    can_fork = True

    def __init__(
        self, config: KVCacheConfig, options: ManagerOptions = DEFAULT_OPTIONS, *, sharding: CacheSharding | None = None
    ) -> None:
        """Build an empty pool; the pages are made when first asked for.

        Args:
            config: sizes; on a mesh those of the whole cache, a block having the tokens of all context ranks.
            options: switches.
            sharding: how the pages lie on a mesh; ``pages`` are ``ShardedKVPages`` then. Nothing is swapped to the host
                and the block size stays. None: on one device.

        Raises:
            DeviceUnavailableError: the host's XLA CPU device is hidden (``JAX_PLATFORMS``).
            ConfigError: a hash algorithm that is not there, heads or blocks that cannot be spread like this, or host
                blocks for a cache on a mesh.
        """
        if sharding is not None:
            sharding.on_rank(config)  # raises: says what does not divide
            if options.num_host_blocks:
                raise ConfigError(
                    f"num_host_blocks: got {options.num_host_blocks} for a cache on a mesh, want 0: preempted requests "
                    f"are computed again there"
                )
        self.config = config
        self.options = options
        self.sharding = sharding
        self._lock = threading.RLock()
        self._state = ManagerState(config, options)
        self._holds = BlockHolds(self._state)
        self._callbacks = PressureCallbacks(options.callback_timeout)
        self._chooser: BlockSizeChooser | None = None

    # -- the pages ---------------------------------------------------------------------------------------------

    @property
    def pages(self) -> KVPages | ShardedKVPages:
        """K and V on the accelerator, made at first use. Assign the new ones back after a step that donated them.

        Between steps the manager itself copies blocks in them (copy-on-write, swap, defragmentation).
        """
        with self._lock:
            if self._state.pages is None:
                if self.sharding is None:
                    self._state.pages = KVPages.create(self.config)
                else:
                    self._state.pages = ShardedKVPages.create(self.config, self.sharding)
            return self._state.pages

    @pages.setter
    def pages(self, pages: KVPages | ShardedKVPages) -> None:
        with self._lock:
            if pages.config is not self.config and pages.config != self.config:
                raise InvalidArgumentError(
                    f"pages: got those of blocks of {pages.config.block_size} tokens, or of another cache, want those "
                    f"of blocks of {self.config.block_size}: assign a step's pages back before the block size changes"
                )
            self._state.pages = pages

    def before_page_moves(self, callback: Callable[[PageMove, list[np.ndarray]], Any]) -> None:
        """Call ``callback("copy" | "clear", ids)`` before blocks are copied or cleared in ``pages``.

        ``ids`` are those of ``KVPages.copy_blocks`` or ``clear_blocks``. For processes that keep pages in step with
        these; it runs under the manager's lock and must not call the manager.
        """
        with self._lock:
            self._state.before_page_move = callback

    # -- requests and their tokens -----------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        tokens: ArrayLike,
        *,
        extras: CacheExtras = NO_EXTRAS,
        read_prefix_cache: bool = True,
    ) -> None:
        """Tell the tokens of a request that will come, so that it can share blocks. It holds nothing yet.

        The step that admits it gives it the cached blocks its tokens begin with, on top of those it computes.

        Args:
            request_id: a new one.
            tokens: i32[n], n >= 1: its prompt.
            extras: what else its blocks depend on.
            read_prefix_cache: False for callers that want every prompt token computed (for their logits, say). Its
                blocks can be read by others all the same.

        Raises:
            DuplicateRequestError: ``request_id`` is already here.
            InvalidArgumentError: no tokens, or not integers of at least 0.
        """
        prompt = token_ids(tokens)
        if not len(prompt):
            raise InvalidArgumentError("tokens: got none, want at least one")
        with self._lock:
            if self._state.is_known(request_id):
                raise DuplicateRequestError(f"request {request_id!r}: is already here, want a new id")
            self._state.register(request_id, prompt, extras, read_prefix_cache)

    def record_tokens(self, request_ids: Sequence[str] | str, tokens: ArrayLike) -> None:
        """Tell the tokens that requests have chosen, before the step that computes them.

        Args:
            request_ids: n ids, one token each; or one id (a string), any number of tokens.
            tokens: i32[n], or those of the one. Tokens of a request that was never added are passed over.

        Raises:
            UnknownRequestError: an id that holds no blocks.
            InvalidArgumentError: not one integer of at least 0 each.
            DuplicateRequestError: an id named twice.
        """
        values = token_ids(tokens)
        with self._lock:
            if isinstance(request_ids, str):
                self._state.tokens.append_run(self._state.rows.row_of(request_ids), values)
                return
            ids = tuple(request_ids)
            if len(ids) != len(values):
                raise InvalidArgumentError(f"tokens: got {len(values)} for {len(ids)} requests, want one each")
            self._state.tokens.append(self._state.rows_holding(ids), values)

    # -- one scheduler step ------------------------------------------------------------------------------------

    def step(
        self,
        request_ids: Sequence[str],
        num_new_tokens: ArrayLike,
        *,
        free: Iterable[str] = (),
        num_rows: int | None = None,
        num_tokens: int | None = None,
    ) -> StepPlan:
        """Free, admit, append and compute slots for a whole batch, in one dispatch.

        Requests in ``free`` give everything back first. Then each request, in the order given, gets the blocks its new
        tokens need or nothing at all; once one does not fit, later ones that need blocks are refused too. An id seen
        for the first time is a new request; if it is refused it is forgotten again.

        A request that was added begins with what the prefix cache has of it, one that was swapped out with what it
        held; ``StepPlan.num_cached_tokens`` tells how much, and those tokens are not to be computed. An added one is
        granted no more than the rest of its known tokens.

        Args:
            request_ids: n distinct ids, most urgent first.
            num_new_tokens: n counts of at least 0.
            free: ids to let go; none of them in ``request_ids``.
            num_rows: pad the batch to this many rows, so that shapes stay the same from step to step. None: n.
            num_tokens: pad to this many tokens. None: decode layout, token i belongs to row i, at most one each.

        Raises:
            UnknownRequestError: an id in ``free`` is not here.
            DuplicateRequestError: an id named twice.
            InvalidArgumentError: a count that is negative or not an integer, more rows or tokens than the padding, or a
                request whose drafts have not been committed.
            RequestTooLongError: a request that would outgrow its row, or the whole pool.
            TooManyRequestsError: no row of the table is left for a new request.
        """
        batch = Batch.of(request_ids, num_new_tokens, free, num_rows, num_tokens)
        with self._lock:
            plan = self._state.step(batch)
            due = self._pressure_due(plan.ok.all())
            if due:
                pressure = self._state.pressure(batch.ids, batch.counts, plan.ok)
        if not due:
            return plan
        return plan.with_errors(self._callbacks.call(due, pressure))

    def warm_up(self, num_rows: int, num_tokens: int | None = None) -> None:
        """Compile what steps padded to these sizes run, so that none of them has to wait for it.

        That is: with and without requests that are freed, with and without cached blocks (as many as one compiled size
        has room for), and giving blocks back between steps. Steps that bring requests back from host memory, and those
        after the first fork, compile when they first come. It runs on a control plane of its own, made and thrown away,
        so that no request notices.
        """
        with self._lock:
            self._state.warm_up(num_rows, num_tokens)

    # -- one request -------------------------------------------------------------------------------------------

    def allocate(self, request_id: str, num_tokens: int) -> list[int]:
        """Admit a new request of ``num_tokens`` tokens and return its block ids.

        A request that was added gets cached blocks as in ``step``; they count among the ``num_tokens``.

        Raises:
            DuplicateRequestError: ``request_id`` already holds blocks.
            OutOfBlocksError: too few free blocks, also after the memory-pressure callbacks had their turn.
            CallbackError: it did not fit, and a memory-pressure callback raised.
            InvalidArgumentError, RequestTooLongError, TooManyRequestsError: as ``step``.
        """
        with self._lock:
            if self._state.holds(request_id):
                raise DuplicateRequestError(f"request {request_id!r}: is already allocated, want a new id or extend()")
        return self._admit_one(request_id, num_tokens)

    def extend(self, request_id: str, additional_tokens: int) -> list[int]:
        """Make room for ``additional_tokens`` more and return all block ids of the request.

        Raises:
            UnknownRequestError: ``request_id`` holds nothing here.
            OutOfBlocksError, CallbackError, InvalidArgumentError, RequestTooLongError: as ``allocate``.
        """
        with self._lock:
            self._state.rows.row_of(request_id)
        return self._admit_one(request_id, additional_tokens)

    def free(self, request_id: str) -> None:
        """Drop the request's references, and forget it; blocks nobody else holds are free again.

        Raises:
            UnknownRequestError: ``request_id`` is not here (also when it is freed a second time).
        """
        with self._lock:
            self._state.free((request_id,))

    def fork(self, parent: str, child: str) -> None:
        """``child`` becomes a request with all tokens of ``parent``, sharing its blocks.

        Blocks that ``parent`` had reserved and not used are given back.

        Whoever first writes into a shared block gets a copy of it: one batched copy a step. For beam search, best-of-n
        and tree search.

        Raises:
            UnknownRequestError: ``parent`` holds no blocks.
            DuplicateRequestError: ``child`` is already here.
            InvalidArgumentError: ``parent`` has drafts that are not committed.
            TooManyRequestsError: no row is left.
        """
        with self._lock:
            self._state.fork(parent, child)

    # -- speculative decoding ----------------------------------------------------------------------------------

    def reserve(self, request_id: str, draft_tokens: int) -> None:
        """Set blocks aside for the request's next token and ``draft_tokens`` guesses after it.

        The next step that includes it can't be refused for them; the last ``draft_tokens`` it brings are drafts until
        ``commit``. Drafts are never hashed.

        Raises:
            UnknownRequestError: it holds no blocks.
            OutOfBlocksError, RequestTooLongError, InvalidArgumentError: as ``extend``; also drafts not yet committed.
        """
        count = int(token_counts([draft_tokens], 1)[0])
        with self._lock:
            if not self._state.reserve(request_id, count):
                raise OutOfBlocksError(
                    f"request {request_id!r}: {count + 1} more tokens do not fit into {self._state.num_free()} free "
                    f"blocks of {self.config.block_size} tokens"
                )

    def commit(self, request_ids: Sequence[str] | str, accepted: ArrayLike) -> None:
        """Keep the first ``accepted`` drafts of each request; the slots and blocks of the others come back.

        Raises:
            UnknownRequestError: an id that holds no blocks.
            InvalidArgumentError: more than its drafts, or none were computed.
            DuplicateRequestError: an id named twice.
        """
        ids = (request_ids,) if isinstance(request_ids, str) else tuple(request_ids)
        counts = token_counts(np.atleast_1d(np.asarray(accepted)), len(ids))
        with self._lock:
            self._state.commit(ids, counts)

    # -- preemption --------------------------------------------------------------------------------------------

    def preempt(self, request_ids: Sequence[str] | str, mode: PreemptionMode = "auto") -> dict[str, str]:
        """Take the blocks of requests away, most of them to be back later: a step that names one resumes it.

        A swapped request keeps all it holds in host memory: one batched, asynchronous transfer for all of them. One to
        be computed again keeps only what the prefix cache does not lose meanwhile; its next step starts like that of a
        new one. (If it was never added, it is forgotten.)

        Args:
            request_ids: that hold blocks.
            mode: "auto": whichever ``ManagerOptions.preemption_cost`` finds quicker, and the host pool has room for.

        Returns:
            What was done with each: "swap" or "recompute".

        Raises:
            UnknownRequestError: an id that holds no blocks.
            OutOfBlocksError: mode "swap", and the host pool is too full for all of them; nothing is done.
            InvalidArgumentError: another mode, or drafts that are not committed.
        """
        ids = (request_ids,) if isinstance(request_ids, str) else tuple(request_ids)
        if mode not in ("auto", "swap", "recompute"):
            raise InvalidArgumentError(f"mode: got {mode!r}, want 'auto', 'swap' or 'recompute'")
        with self._lock:
            return self._state.preempt(ids, mode)

    # -- the prefix cache --------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forget the content of every block; requests keep theirs, holds do not. The hit rate starts anew."""
        with self._lock:
            self._state.reset_prefix_cache()
            self._holds.forget_content()

    def evict_prefix(self, tokens: ArrayLike, *, extras: CacheExtras = NO_EXTRAS) -> int:
        """Forget the cached blocks of this very prefix (its full blocks), in all groups; how many there were.

        Raises:
            InvalidArgumentError: not integers of at least 0.
        """
        with self._lock:
            return self._state.evict_prefix(token_ids(tokens), extras)

    # -- order ---------------------------------------------------------------------------------------------------

    def defragment(self, *, runs: bool = False, below: float | None = None) -> DefragmentationReport:
        """Move the blocks in use to the lowest ids by one batched copy; tables and keys follow. Costs O(pool).

        Args:
            runs: also put each request's blocks into one run, as far as none is shared; moves more. Attention through
                small blocks is faster where they stand in runs.
            below: move nothing unless less than this share of the blocks stands right behind the one before, so that
                it can be called every few steps. None: move in any case.
        """
        with self._lock:
            return self._state.defragment(runs, float("inf") if below is None else below)

    def change_block_size(self, block_size: int) -> BlockSizeReport:
        """Give all that requests hold blocks of another size, here and in host memory; ``config`` changes with it.

        Call it between steps: plans made before name blocks of the old size. A size that divides the present one moves
        nothing; else what does not already stand in runs is copied, all at once. Full blocks of known tokens can be hit
        as before; what is cached of requests that are gone is forgotten. Blocks that were reserved come back. Costs
        O(pool), and programs for the new size compile when they are first needed (see ``warm_up``).

        Args:
            block_size: tokens; a multiple of the kernel block size (``KVCacheConfig.kernel_block_size``).

        Raises:
            ConfigError: not such a multiple, or more than all the pages hold.
            OutOfBlocksError: what is held takes more blocks of this size than there would be, on the device or the
                host.
            InvalidArgumentError: a request has drafts that are not committed, a hold is open (see ``hold_prefix``), or
                the cache is on a mesh.
        """
        self._check_may_change_block_size()
        with self._lock:
            self._holds.check_none_open()
            report = self._state.change_block_size(block_size)
            self.config = self._state.config
            return report

    def adapt_block_size(self, chooser: BlockSizeChooser | None = None) -> int:
        """Look at the lengths of the requests that hold blocks, and change the block size if another one pays.

        While a hold is open (``hold_prefix``), it stays.

        For now and then, say every few hundred steps. Where the present requests have no room in blocks of the better
        size, the present one stays.

        Args:
            chooser: what weighs the sizes, with all it has seen. None: one of the manager's own.

        Returns:
            The block size in use then.

        Raises:
            InvalidArgumentError: a request has drafts that are not committed, or the cache is on a mesh.
        """
        self._check_may_change_block_size()
        with self._lock:
            if self._holds.open_ids():
                return self.config.block_size
            if chooser is None:
                chooser = self._chooser = self._chooser or BlockSizeChooser(self.config)
            self._state.adapt_block_size(chooser)
            self.config = self._state.config
            return self.config.block_size

    def _check_may_change_block_size(self) -> None:
        if self.sharding is not None:
            raise InvalidArgumentError(
                f"block size: got a change of it for {self.sharding}, want a cache on one device"
            )

    # -- memory pressure ---------------------------------------------------------------------------------------

    def on_memory_pressure(self, callback: PressureCallback, *, threshold: float | None = None) -> None:
        """Call ``callback(MemoryPressure)`` when blocks are short.

        It runs after the step is complete, outside the lock, in a thread of its own, and may call this manager (to free
        something, say). ``allocate`` and ``extend`` try once more after it. One that raises, or does not return within
        ``ManagerOptions.callback_timeout``, never disturbs a step: ``StepPlan.callback_errors`` reports it.

        Args:
            callback: told who was refused and what letting go of each request would free.
            threshold: call when usage rises to this share of the pool. None: when a request is refused.

        Raises:
            InvalidArgumentError: not callable, or a threshold outside (0, 1].
        """
        with self._lock:
            self._callbacks.add(callback, threshold)

    def _trigger_memory_pressure(
        self, ids: Sequence[str] = (), counts: Sequence[int] | np.ndarray = ()
    ) -> tuple[CallbackError, ...]:
        """Tell every callback that is due that these requests were refused."""
        with self._lock:
            due = self._pressure_due(not ids)
            pressure = self._state.pressure(tuple(ids), np.asarray(counts), np.zeros(len(ids), bool)) if due else None
        return () if pressure is None else self._callbacks.call(due, pressure)

    def _pressure_due(self, all_served: bool | np.bool_) -> list:
        if all_served and not self._callbacks.has_thresholds:
            return []
        return self._callbacks.due(1.0 - self._state.num_free() / self.config.pool_blocks, not all_served)

    def _admit_one(self, request_id: str, num_tokens: int) -> list[int]:
        """Admit or extend one request; give pressure callbacks one chance to make room, without the lock."""
        counts = token_counts([num_tokens], 1)
        for attempt in range(2):
            with self._lock:
                if self._state.admit(request_id, int(counts[0])):
                    blocks = self.get_block_table(request_id)
                    break
            if attempt == 0:
                for error in self._trigger_memory_pressure((request_id,), counts):
                    raise error
        else:
            raise OutOfBlocksError(
                f"request {request_id!r}: {num_tokens} more tokens do not fit into {self.get_num_free_blocks()} free "
                f"blocks of {self.config.block_size} tokens (pool: {self.config.pool_blocks})"
            )
        if self._callbacks.has_thresholds:
            self._trigger_memory_pressure()
        return blocks
