"""Inside the TPU attention kernel: pages by DMA through the block table, and the table itself by DMA before them.

Tables stand in HBM, of any size. A step of an item needs a few neighbouring columns of one row, so a piece of that row
around them is brought to scalar memory. Everything is one turn ahead of what needs it: while a turn is computed, the
pages of the next one are on their way, and the piece of the table of the one after that.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.paged_attention.mosaic_tpu_memory import TABLE_BUFFERS, Arrays, Plan, Scalars, Scratch


class Turn(NamedTuple):
    """Where a core is: at step ``step`` of item ``item``, after ``count`` other steps of any item. All i32[]."""

    item: Any
    step: Any
    count: Any

    @property
    def buffer(self) -> Any:
        """Of pages."""
        return self.count & 1

    @property
    def table_buffer(self) -> Any:
        """Of pieces of the table."""
        return self.count & (TABLE_BUFFERS - 1)


class Page(NamedTuple):
    """An entry of a step: whether there is a page, its id, its column in the table, its first position or None."""

    wanted: Any
    block: Any
    column: Any
    position: Any


@dataclasses.dataclass(frozen=True)
class Fetch:
    """The transfers of one kernel."""

    plan: Plan
    scalars: Scalars
    arrays: Arrays
    scratch: Scratch

    def num_steps(self, item: Any) -> Any:
        """Steps of an item: one at least, be it over no pages, so that every item ends alike."""
        first, last = (side[item] for side in self.scalars.columns)
        return jnp.maximum(pl.cdiv(last - first, self.plan.step), 1)

    def after(self, turn: Turn) -> Turn:
        """The next turn, be it past the last item."""
        is_last = turn.step + 1 == self.num_steps(turn.item)
        item, step = jnp.where(is_last, turn.item + 1, turn.item), jnp.where(is_last, 0, turn.step + 1)
        return Turn(item, step, turn.count + 1)

    def start_first(self, turn: Turn, end: Any) -> None:
        """The first turn of all."""
        self.each_table_copy(turn, lambda copy: copy.start())
        self.start(turn, end)

    def start(self, turn: Turn, end: Any) -> None:
        """The pages of ``turn``, whose piece of the table is on its way, and the piece of the turn after it."""
        following = self.after(turn)

        @pl.when(following.item < end)
        def start_table() -> None:
            self.each_table_copy(following, lambda copy: copy.start())

        self.each_table_copy(turn, lambda copy: copy.wait())
        self.start_pages(turn)

    # The table.

    def first_column(self, turn: Turn) -> Any:
        """Column of the table where the step starts."""
        return self.scalars.columns[0][turn.item] + turn.step * self.plan.step

    def piece_start(self, turn: Turn) -> Any:
        """Column where its piece starts: transfers start at whole tiles."""
        whole = lax.div(self.first_column(turn), LANES) * LANES
        return pl.multiple_of(jnp.minimum(whole, self.arrays.blocks.shape[1] - self.plan.piece), LANES)

    def each_table_copy(self, turn: Turn, do: Any) -> None:
        """``do`` the transfers of the piece of the table that a turn needs."""
        row = self.scalars.items.sequence[turn.item], pl.ds(self.piece_start(turn), self.plan.piece)
        buffer = turn.table_buffer
        for table, pieces in (
            (self.arrays.blocks, self.scratch.blocks),
            (self.arrays.positions, self.scratch.positions),
        ):
            if table is not None:
                semaphore = self.scratch.semaphores.tables.at[buffer]
                do(pltpu.make_async_copy(table.at[row], pieces.at[buffer], semaphore))

    def page(self, turn: Turn, place: Any) -> Page:
        """The page at ``place`` of a step. Ids outside the pool are no pages."""
        column = self.first_column(turn) + place
        entry = turn.table_buffer, jnp.minimum(column - self.piece_start(turn), self.plan.piece - 1)
        block = self.scratch.blocks[entry]
        wanted = (column < self.scalars.columns[1][turn.item]) & (block >= 0) & (block < self.arrays.k_pages.shape[0])
        position = None
        if self.arrays.positions is not None:
            position = self.scratch.positions[entry]
            wanted &= position >= 0
        return Page(wanted, jnp.where(wanted, block, 0), column, position)

    # Pages.

    def page_copies(self, block: Any, place: Any, buffer: Any) -> tuple[Any, Any]:
        """The transfers of one page of K and one of V."""
        semaphore = self.scratch.semaphores.pages.at[buffer]
        k = pltpu.make_async_copy(self.arrays.k_pages.at[block], self.scratch.k.at[buffer, place], semaphore)
        v = pltpu.make_async_copy(self.arrays.v_pages.at[block], self.scratch.v.at[buffer, place], semaphore)
        return k, v

    def start_pages(self, turn: Turn) -> None:
        def start(place: Any, fetched: Any) -> Any:
            page = self.page(turn, place)

            @pl.when(page.wanted)
            def start_page() -> None:
                for copy in self.page_copies(page.block, place, turn.buffer):
                    copy.start()

            return fetched + page.wanted.astype(jnp.int32)

        self.scratch.fetched[turn.buffer] = lax.fori_loop(0, self.plan.step, start, 0)

    def is_full(self, turn: Turn) -> Any:
        """Whether every place of the step has a page."""
        return self.scratch.fetched[turn.buffer] == self.plan.step

    def wait_pages(self, turn: Turn) -> None:
        @pl.when(self.is_full(turn))
        def wait_once() -> None:  # for as many bytes as the whole buffer has
            for pages in (self.scratch.k, self.scratch.v):
                whole = pages.at[turn.buffer]
                pltpu.make_async_copy(whole, whole, self.scratch.semaphores.pages.at[turn.buffer]).wait()

        @pl.loop(0, jnp.where(self.is_full(turn), 0, self.plan.step))
        def wait(place: Any) -> None:
            page = self.page(turn, place)

            @pl.when(page.wanted)
            def wait_page() -> None:
                for copy in self.page_copies(page.block, place, turn.buffer):
                    copy.wait()
