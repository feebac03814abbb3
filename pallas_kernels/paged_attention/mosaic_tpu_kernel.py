"""The attention kernel for TPUs: a loop over items, in it a loop over steps of pages, in it a loop over KV heads.

Pages come by DMA, one transfer a page for all of its heads (``mosaic_tpu_pages``). While a step is computed, the pages
of the next one are on their way, be it of the same item or of the one after; so are the queries of the next item and
the output of the last. Rows of a KV head are the queries of its group: ``row = query * group +
head``, so that one read of K and V serves them all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.number_format import decode
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.mosaic_tpu_memory import Arrays, Outputs, Plan, Scalars, Scratch
from pallas_kernels.paged_attention.mosaic_tpu_pages import Fetch, Page, Turn
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Item


def attend(
    plan: Plan, scalars: Scalars, arrays: Arrays, unaliased: Outputs, outputs: Outputs, scratch: Scratch
) -> None:
    """The whole kernel."""
    del unaliased  # the same memory as outputs
    _Kernel(plan, scalars, arrays, outputs, scratch).run()


@dataclasses.dataclass(frozen=True)
class _Kernel:
    plan: Plan
    scalars: Scalars
    arrays: Arrays
    outputs: Outputs
    scratch: Scratch

    @property
    def fetch(self) -> Fetch:
        return Fetch(self.plan, self.scalars, self.arrays, self.scratch)

    def run(self) -> None:
        """This core's share of the items, which is an even one."""
        core, num_cores, num_items = pl.program_id(0), pl.num_programs(0), self.scalars.num_items[0]
        first, end = core * num_items // num_cores, (core + 1) * num_items // num_cores
        self.scratch.rows[...] = jnp.zeros_like(self.scratch.rows)

        @pl.when(first < end)
        def start() -> None:
            self.start_queries(first)
            self.fetch.start_first(Turn(first, 0, 0), end)

        lax.fori_loop(first, end, lambda index, count: self.attend_item(index, count, first, end), 0)

        @pl.when(first < end)
        def finish() -> None:
            self.wait_results(end - 1)

    def attend_item(self, index: Any, count: Any, first: Any, end: Any) -> Any:
        """One item of ``first`` to ``end``, after ``count`` steps of others; its first pages are on their way.

        Returns the count after it.
        """
        self.wait_queries(index)

        @pl.when(index + 1 < end)
        def start_next() -> None:
            self.start_queries(index + 1)

        self.load_rows(index)
        item = Item(*(field[index] for field in self.scalars.items))

        def attend_step(step: Any, count: Any) -> Any:
            turn = Turn(index, step, count)
            following = self.fetch.after(turn)

            @pl.when(following.item < end)
            def start_next() -> None:
                self.fetch.start(following, end)

            self.fetch.wait_pages(turn)
            self.attend_pages(item, turn)
            return count + 1

        count = lax.fori_loop(0, self.fetch.num_steps(index), attend_step, count)

        @pl.when(index > first)
        def wait_last() -> None:
            self.wait_results(index - 1)

        self.store_results(item)
        self.each_result_copy(index, lambda copy: copy.start())
        return count

    # Queries and results: a tile's first num_rows rows.

    def each_row_copy(self, index: Any, hbm: Any, vmem: Any, semaphore: Any, inward: bool, do: Any) -> None:
        """``do`` every transfer between the tile ``vmem`` and its place in ``hbm``: one, when the tile is full."""
        token, num_rows = self.scalars.items.token[index], self.scalars.items.num_rows[index]
        done: Any = 0
        for size in sorted({1, 8, self.plan.tile}, reverse=True):
            if size > min(self.plan.tile, hbm.shape[0]):
                continue
            count = (num_rows - done) // size

            def transfer(i: Any, size: int = size, done: Any = done) -> None:
                row = done + i * size
                sides = hbm.at[pl.ds(token + row, size)], vmem.at[pl.ds(row, size)]
                do(pltpu.make_async_copy(*(sides if inward else sides[::-1]), semaphore))

            pl.loop(0, count)(transfer)
            done += count * size

    def each_query_copy(self, index: Any, do: Any) -> None:
        semaphore = self.scratch.semaphores.q.at[index % 2]
        self.each_row_copy(index, self.arrays.q, self.scratch.q.at[index % 2], semaphore, True, do)

    def start_queries(self, index: Any) -> None:
        self.each_query_copy(index, lambda copy: copy.start())

    def wait_queries(self, index: Any) -> None:
        self.each_query_copy(index, lambda copy: copy.wait())

    def each_result_copy(self, index: Any, do: Any) -> None:
        for hbm, vmem in zip(self.outputs, self.scratch.results, strict=True):
            if hbm is not None:
                self.each_row_copy(index, hbm, vmem, self.scratch.semaphores.results.at[0], False, do)

    def wait_results(self, index: Any) -> None:
        self.each_result_copy(index, lambda copy: copy.wait())

    # Arithmetic.

    def load_rows(self, index: Any) -> None:
        """Queries into rows by KV head, and a softmax over no keys, or over the sinks."""
        plan, scratch = self.plan, self.scratch
        used = plan.tile * plan.group
        for head in range(plan.kv_heads):
            queries = scratch.q[index % 2, :, head * plan.group : (head + 1) * plan.group, :]
            rows = queries.astype(jnp.float32).reshape(used, plan.head_dim)
            scratch.rows[head, :used] = rows.astype(plan.compute)
        if self.arrays.sinks is None:
            scratch.highest[...] = jnp.full_like(scratch.highest, -jnp.inf)
            scratch.total[...] = jnp.zeros_like(scratch.total)
        else:
            scratch.highest[...] = self.arrays.sinks[...]
            scratch.total[...] = jnp.where(self.arrays.sinks[...] > -jnp.inf, 1.0, 0.0)
        scratch.values[...] = jnp.zeros_like(scratch.values)

    def row_positions(self, item: Item) -> Any:
        """Position of every row's query, i32[rows, 1]."""
        row = lax.broadcasted_iota(jnp.int32, (self.plan.rows, 1), 0)
        return item.position + row // self.plan.group

    @property
    def visibility(self) -> Visibility:
        window, chunk = (
            None if ref is None else ref[0] for ref in (self.scalars.sliding_window, self.scalars.chunk_size)
        )
        return Visibility(self.plan.causal, window, chunk)

    def locate_keys(self, turn: Turn) -> None:
        """Put the position of every key of a step into scratch, along lanes and along sublanes; -1 where none is."""
        plan, scratch = self.plan, self.scratch
        context = ContextParallel(plan.context_size, self.scalars.rank[0], plan.interleave)

        def position(page: Page, key: Any) -> Any:
            if page.position is None:
                at = context.position(page.column * plan.block_size + key)
            else:
                at = page.position + context.position(key)
            return jnp.where(page.wanted, at, -1)

        key = lax.broadcasted_iota(jnp.int32, (1, plan.keys), 1)

        def locate(place: Any, across: Any) -> Any:
            page = self.fetch.page(turn, place)
            down = lax.broadcasted_iota(jnp.int32, (plan.block_size, 1), 0)
            scratch.keys_down[place] = position(page, down)
            offset = key - place * plan.block_size
            here = (offset >= 0) & (offset < plan.block_size)
            return jnp.where(here, position(page, jnp.maximum(offset, 0)), across)

        scratch.keys_across[...] = lax.fori_loop(0, plan.step, locate, jnp.full_like(key, -1))

    def attend_pages(self, item: Item, turn: Turn) -> None:
        """One step: without a mask where every query sees every key."""
        plan = self.plan
        last_query = item.position + item.num_rows - 1
        lowest_start, lowest_end = self.visibility.interval(item.position, item.kv_len)
        highest_start, highest_end = self.visibility.interval(last_query, item.kv_len)
        unmasked = False
        if self.arrays.positions is None:
            context = ContextParallel(plan.context_size, self.scalars.rank[0], plan.interleave)
            first_key = self.fetch.first_column(turn) * plan.block_size
            last_key = first_key + plan.keys - 1
            unmasked = (
                self.fetch.is_full(turn)
                & (context.position(first_key) >= highest_start)
                & (context.position(last_key) < lowest_end)
            )

            @pl.when(unmasked)
            def attend_all() -> None:
                self.each_head(lambda head: self.add_head(head, turn.buffer, lambda logits, v: (logits, v)))

        @pl.when(jnp.logical_not(unmasked))
        def attend_masked() -> None:
            self.locate_keys(turn)
            across = self.scratch.keys_across[...]
            down = self.scratch.keys_down[...].reshape(plan.keys, 1)
            start, end = self.visibility.interval(self.row_positions(item), item.kv_len)

            def mask(logits: Any, v: Any) -> tuple[Any, Any]:
                # A weight of 0 does not hide a NaN value (0 * NaN is NaN): values nobody sees are 0.
                logits = jnp.where((across >= start) & (across < end), logits, -jnp.inf)
                return logits, jnp.where((down >= lowest_start) & (down < highest_end), v, 0)

            self.each_head(lambda head: self.add_head(head, turn.buffer, mask))

    def each_head(self, do: Any) -> None:
        lax.fori_loop(0, self.plan.kv_heads, lambda head, _: do(head), None, unroll=self.plan.kv_heads <= 2)

    def keys_of(self, pages: Any, buffer: Any, head: Any, head_dim: int) -> Any:
        """K or V of one head, [keys, head_dim], any scale not yet applied."""
        stored = pages[buffer, :, head, :, :head_dim]
        if stored.dtype != self.plan.compute:
            stored = decode(stored, self.plan.kv_dtype).astype(self.plan.compute)
        return stored.reshape(self.plan.keys, head_dim)

    def add_head(self, head: Any, buffer: Any, mask: Any) -> None:
        """The online softmax of one KV head over one more step of keys."""
        scratch = self.scratch
        k = self.keys_of(scratch.k, buffer, head, self.plan.head_dim)
        v = self.keys_of(scratch.v, buffer, head, self.plan.v_head_dim)
        logits = self.product(scratch.rows[head], k, 1) * self.scalars.logits_scale[head]
        if self.scalars.logits_soft_cap is not None:
            cap = self.scalars.logits_soft_cap[0]
            logits = cap * jnp.tanh(logits / cap)
        logits, v = mask(logits, v)
        before = scratch.highest[head]
        highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(highest == -jnp.inf, 0, highest)  # exp(-inf - -inf) is NaN
        weights, decay = jnp.exp(logits - base), jnp.exp(before - base)
        scratch.highest[head] = highest
        scratch.total[head] = scratch.total[head] * decay + jnp.sum(weights, axis=1, keepdims=True)
        scratch.values[head] = scratch.values[head] * decay + self.product(weights.astype(self.plan.compute), v, 0)

    def product(self, left: Any, right: Any, contract: int) -> Any:
        """left [m, x] by right over its dimension ``contract``, in float32."""
        # Never None, which is what jax_default_matmul_precision says, and Mosaic multiplies bfloat16 in one way only.
        precision = lax.Precision.HIGHEST if self.plan.compute == jnp.float32 else lax.Precision.DEFAULT
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def store_results(self, item: Item) -> None:
        """The finished softmax, by query again."""
        plan, scratch = self.plan, self.scratch
        used = plan.tile * plan.group
        is_real = (
            self.row_positions(item)[:used] >= 0
        )  # a query before the first position sees nothing, not even a sink
        for head in range(plan.kv_heads):
            total = scratch.total[head][:used]
            values = scratch.values[head][:used] / jnp.where(total > 0, total, 1) * self.scalars.v_scale[head]
            mine = slice(head * plan.group, (head + 1) * plan.group)
            out, lse = scratch.results
            values = jnp.where(is_real, values, 0).reshape(plan.tile, plan.group, plan.v_head_dim)
            out[:, mine, :] = values.astype(out.dtype)
            if lse is not None:
                number = jnp.where(is_real, scratch.highest[head][:used] + jnp.log(total), -jnp.inf)
                number = jnp.broadcast_to(number, (used, lse.shape[2]))
                lse[:, mine, :] = number.reshape(plan.tile, plan.group, lse.shape[2])
