"""Another block size for everything a manager holds: tables, pages, host memory, known tokens and the prefix cache."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.cache.block_size_change import BlockSizeChange, change_block_size
from pyagent_kv_jax.cache.grouped_rows import GroupedRows
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.errors import OutOfBlocksError
from pyagent_kv_jax.manager.block_size_adaptation import BlockSizeChooser
from pyagent_kv_jax.manager.control_plane import ControlPlane
from pyagent_kv_jax.manager.manager_parts import ManagerParts
from pyagent_kv_jax.manager.prefix.block_hash import BlockHasher
from pyagent_kv_jax.manager.prefix.events import AllBlocksCleared
from pyagent_kv_jax.manager.prefix_filling import PrefixFiller
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable


@dataclasses.dataclass(frozen=True)
class BlockSizeReport:
    """What ``KVCacheManager.change_block_size`` did.

    Attributes:
        block_size: tokens of a block now.
        num_copied: pages (kernel blocks) whose content was copied on the device, each in every layer.
        num_copied_on_host: likewise of requests that are swapped out.
        num_left_over: pages of each layer that make no whole block of this size: out of use until it changes again.
    """

    block_size: int
    num_copied: int
    num_copied_on_host: int
    num_left_over: int


class ChangesBlockSize(ManagerParts):
    """``ManagerState``'s change of block size."""

    def change_block_size(self, block_size: int) -> BlockSizeReport:
        """See ``KVCacheManager.change_block_size``."""
        config, control, ids = self.config.with_block_size(block_size), self.control, tuple(self.rows.ids())
        self._check_committed(ids, self.rows.rows_of(ids))
        left_over = config.pages_per_layer - config.pool_blocks * config.pages_per_block
        if config.block_size == self.config.block_size:
            return BlockSizeReport(config.block_size, 0, 0, left_over)
        change = self._change_of_tables(control, config)
        on_host = self.swap.block_size_change(config)
        # Nothing raises from here on.
        if self.pages is not None:
            assert isinstance(self.pages, KVPages)  # on a mesh the block size stays
            self.pages = change.move(self.pages, config, zero=self.options.zero_on_free)
        released = np.asarray(control.state.released).reshape(self._hollow.shape) * self.config.block_size
        self._hollow = np.maximum(self._hollow, released)
        self._control = self._control_of(config, change)
        self._resize(config)
        self.swap.change_block_size(config, on_host, self.hasher)
        self._enter_again()
        return BlockSizeReport(config.block_size, len(change.copy_src), len(on_host.copy_src), left_over)

    def adapt_block_size(self, chooser: BlockSizeChooser) -> None:
        """See ``KVCacheManager.adapt_block_size``."""
        rows = self.rows.rows_of(tuple(self.rows.ids()))
        swapped = [each.num_tokens for each in self.swap.requests.values()]
        chooser.observe(np.concatenate([self.control.lengths()[rows], np.array(swapped, np.int32)]))
        chooser.block_size = self.config.block_size
        with contextlib.suppress(OutOfBlocksError):  # the requests of now have no room in the blocks of later
            self.change_block_size(chooser.choose())
        chooser.block_size = self.config.block_size

    def _change_of_tables(self, control: ControlPlane, config: KVCacheConfig) -> BlockSizeChange:
        table = control.state.table
        return change_block_size(
            np.asarray(table.blocks),
            np.asarray(table.num_tokens),
            control.ref_counts(),
            old_size=self.config.block_size,
            new_size=config.block_size,
            page_size=config.page_size,
            num_blocks=config.pool_blocks,
            width=config.table_config().max_num_blocks_per_req,
            num_groups=len(config.groups),
        )

    def _control_of(self, config: KVCacheConfig, change: BlockSizeChange) -> ControlPlane:
        """A control plane with the tables of ``change``; no block has cached content."""
        control = ControlPlane(config, self.options.prediction_horizon)
        control.may_copy = self._control.may_copy
        before = self._control.state
        with jax.default_device(DeviceType.CPU.devices()[0]):
            table = BlockTable(
                blocks=jnp.asarray(change.tables),
                num_blocks=jnp.asarray(change.num_blocks),
                num_tokens=before.table.num_tokens,
                config=control.state.table.config,
            )
            pool, released = BlockPool.with_references(change.ref_counts), jnp.asarray(change.released)
        control.rearrange(GroupedRows(pool, table, released, before.groups))
        return control

    def _resize(self, config: KVCacheConfig) -> None:
        """All other parts that count in blocks; the prefix cache is empty then."""
        self.config = config
        self.ahead.resize(config)
        self.hasher = BlockHasher(config.block_size, self.options.hash_algorithm)
        self.waiting = {request_id: record.rehashed(self.hasher) for request_id, record in self.waiting.items()}
        self.tokens = self.tokens.rehashed(self.hasher)
        self.prefixes = self.prefixes.emptied(config.pool_blocks, config.block_size)
        self.filler = PrefixFiller(self.tokens, self.prefixes, self.events)
        self._most_tokens = config.max_request_tokens
        self._expected[:] = 0  # what was reserved has been given back
        self.events.append(AllBlocksCleared())

    def _enter_again(self) -> None:
        """The full blocks of requests that hold any, as far as their tokens are known, into the prefix cache."""
        if not self.options.prefix_caching:
            return
        rows = self.rows.rows_of(tuple(self.rows.ids()))
        filling = self.filler.plan(rows, self._control.lengths()[rows].astype(np.int64))
        if filling is not None:
            tables = self._control.tables()[:, rows]
            for entered in self.filler.enter(filling, np.ones(len(rows), bool), tables, self._hollow):
                self._control.mark_cached(entered)
