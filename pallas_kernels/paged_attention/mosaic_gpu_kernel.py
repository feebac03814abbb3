"""The attention kernel in Mosaic GPU: tiles of 128 rows of queries against the keys they see, on Hopper.

A program is three warpgroups. One, the producer, looks up pages in the block table and has the tensor memory
accelerator fetch them into shared memory, a few steps of keys ahead. The other two, the consumers, hold 64 rows of
queries each: two heads of one KV head over the same 64 queries, or, where heads do not come in pairs, 128 queries of
one head. They share every key and value that is fetched; softmax and sums stay in their registers (FlashAttention-3,
arXiv 2407.08608). With ``take_turns``, one consumer's softmax runs while the other has the tensor cores.

What barriers say: ``ready``, a step's keys or values have arrived, and their positions; ``used``, both consumers are
done with them; ``cleaned``, see ``Consumer.clean``; ``turn``, a consumer has issued its product, or ended its softmax.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu import WARPGROUP_ROWS as ROWS
from pallas_kernels.mosaic_gpu import Registers, across_columns, down_rows, plgpu
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.mosaic_gpu_tiles import Tile
from pallas_kernels.paged_attention.triton_kernel import LOG2_E
from pallas_kernels.paged_attention.visibility import Visibility

CONSUMERS = 2
# Of 65,536 a multiprocessor: 2 * 128 * 224 + 128 * 56. Accumulators, logits and weights want 160 of a consumer's.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 224, 56
# For a scale of 0: 0 times the -inf of a key that is not seen would be NaN.
_SMALLEST = 1e-30


class Inputs(NamedTuple):
    """What the kernel reads; None where the call has no such thing.

    Attributes:
        q: [tokens, q_heads, head_dim], tokens a multiple of 8 and at least 64.
        k_rows, v_rows: [pages * kv_heads * block_size, D], the pages.
        blocks: i32[seqs, columns], -1: no page; as many spare columns as a step has.
        positions: None, or i32[seqs, columns].
        tiles: i32[tiles, fields], see ``Tile``.
        factors: f32[2, kv_heads], of the logits (base 2, unless there is a soft cap) and of the output.
        cap: None or f32[1].
        sinks: None or f32[q_heads], base 2.
        sliding_window, chunk_size, rank: None or i32[1].
    """

    q: Any
    k_rows: Any
    v_rows: Any
    blocks: Any
    positions: Any
    tiles: Any
    factors: Any
    cap: Any
    sinks: Any
    sliding_window: Any
    chunk_size: Any
    rank: Any


class Fetched(NamedTuple):
    """Keys, or values, in shared memory: ``stages`` steps in flight or in use.

    Attributes:
        rows: [stages, keys, head_dim].
        positions: i32[stages, keys], position of each; -1: not there, and the row is anything.
        ready, used: a barrier for each stage.
    """

    rows: Any
    positions: Any
    ready: Any
    used: Any


class Memory(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        q: [2, 64, head_dim], of each consumer, in the end its result; ``q_ready``: a barrier for each.
        k, v: what the producer fetches.
        out: [2, 64, v_head_dim and some spare columns], result of which not all rows are stored.
        lse: f32[2, 64].
        cleaned: a barrier for each stage.
        turn: one.
    """

    q: Any
    q_ready: Any
    k: Fetched
    v: Fetched
    out: Any
    lse: Any
    cleaned: Any
    turn: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Everything static.

    Attributes:
        keys: of a step; a multiple or a divisor of the block size.
        stages: steps in shared memory at a time.
        take_turns: whether consumers order their use of the tensor cores.
        paired_heads: whether consumers hold two heads of a KV head, or the two halves of 128 queries of one.
        group: q heads of a KV head.
        block_size, kv_heads: of the pages.
        head_dim, v_head_dim: logical sizes.
        causal: whether queries see no later key.
        context_size, context_interleave: of ``ContextParallel``.
        interpret: whether the kernel is interpreted.
    """

    keys: int
    stages: int
    take_turns: bool
    paired_heads: bool
    group: int
    block_size: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    causal: bool
    context_size: int
    context_interleave: int
    interpret: bool

    @property
    def page_keys(self) -> int:
        """Keys of a step that stand in one page."""
        return min(self.block_size, self.keys)

    @property
    def pages(self) -> int:
        """Pages of a step."""
        return self.keys // self.page_keys

    @property
    def heads_a_tile(self) -> int:
        return CONSUMERS if self.paired_heads else 1

    @property
    def queries_a_tile(self) -> int:
        return CONSUMERS * ROWS // self.heads_a_tile

    def __call__(self, given: Inputs, out: Any, lse: Any, memory: Memory) -> None:
        """Refs: what is given; out [tokens, q_heads, v_head_dim]; lse f32[tiles, q_heads, queries of a tile]."""
        index = lax.axis_index("tile")
        tile = Tile.read(given.tiles, index)
        warpgroup, heads = lax.axis_index("warpgroup"), lax.axis_index("heads") * self.heads_a_tile

        @pl.when((warpgroup < CONSUMERS) & (tile.num_queries > 0))
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            Consumer.create(self, given, memory, tile, warpgroup, heads).run(out, lse, index)

        @pl.when((warpgroup == CONSUMERS) & (tile.num_queries > 0))
        def _() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(self, given, memory, tile, lax.div(heads, self.group))

    def context(self, given: Inputs) -> ContextParallel:
        return ContextParallel(self.context_size, _one(given.rank, 0), self.context_interleave)


def produce(kernel: Kernel, given: Inputs, memory: Memory, tile: Tile, kv_head: Any) -> None:
    """Fetch keys and values of every step of the tile, ``stages`` steps ahead of the consumers at most."""

    @pl.loop(tile.first_step, tile.last_step)
    def _(step: Any) -> None:
        done = step - tile.first_step
        slot = lax.rem(done, kernel.stages)
        columns, offset = step_columns(kernel, step)
        pages = [given.blocks[tile.sequence, column] for column in columns]
        rows = [(jnp.maximum(page, 0) * kernel.kv_heads + kv_head) * kernel.block_size + offset for page in pages]
        positions = key_positions(kernel, given, tile, step, columns, offset, pages)
        for source, target in ((given.k_rows, memory.k), (given.v_rows, memory.v)):
            pl.when(done >= kernel.stages)(partial(plgpu.barrier_wait, target.used.at[slot]))
            target.positions.at[slot][...] = positions
            plgpu.barrier_arrive(target.ready.at[slot])
            for number, row in enumerate(rows):
                part = pl.ds(number * kernel.page_keys, kernel.page_keys)
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(row, kernel.page_keys), pl.ds(0, target.rows.shape[2])],
                    target.rows.at[slot, part],
                    target.ready.at[slot],
                )

    steps = tile.last_step - tile.first_step

    @pl.loop(jnp.maximum(steps - kernel.stages, 0), steps)
    def _(done: Any) -> None:  # nothing is left behind in a barrier
        for target in (memory.k, memory.v):
            plgpu.barrier_wait(target.used.at[lax.rem(done, kernel.stages)])


def step_columns(kernel: Kernel, step: Any) -> tuple[list[Any], Any]:
    """Columns of the table that hold the keys of ``step``, and where in the (first) page they start."""
    if kernel.block_size <= kernel.keys:
        return [step * kernel.pages + number for number in range(kernel.pages)], jnp.int32(0)
    first = step * kernel.keys
    return [lax.div(first, kernel.block_size)], lax.rem(first, kernel.block_size)


def key_positions(
    kernel: Kernel, given: Inputs, tile: Tile, step: Any, columns: list[Any], offset: Any, pages: list[Any]
) -> jax.Array:
    """i32[keys]: the position of each key of ``step``, -1 where there is no page."""
    context = kernel.context(given)
    index = Registers(kernel.interpret).of_threads(lax.iota(jnp.int32, kernel.keys))
    if given.positions is None:
        positions = context.position(step * kernel.keys + index)
    else:
        positions = context.position(offset + lax.rem(index, kernel.page_keys))
    for number, (column, page) in enumerate(zip(columns, pages, strict=True)):
        mine = (index >= number * kernel.page_keys) & (index < (number + 1) * kernel.page_keys)
        if given.positions is None:
            positions = jnp.where(mine & (page < 0), -1, positions)
        else:
            base = given.positions[tile.sequence, column]
            there = (page >= 0) & (base >= 0)
            positions = jnp.where(mine, jnp.where(there, positions + base, -1), positions)
    return positions


class Softmax(NamedTuple):
    """A softmax under way, f32: highest logit (base 2) and total weight [64], weighted values [64, v_head_dim]."""

    highest: Any
    total: Any
    values: Any


class Consumer(NamedTuple):
    """One consumer's 64 rows of queries.

    Attributes:
        kernel, given, memory, tile: what it works with.
        number: which consumer.
        head: its q head.
        token: row of q that its first row holds, a multiple of 8.
        first_row, last_row: first and one past the last of its rows that are queries of the tile's.
        start, end: i32[64], the interval of positions that each row sees.
        exists: bool[64], whether the row is a query at a position of 0 or more.
        factor: f32[], what products of q and k are multiplied with: logits, base 2 unless there is a soft cap.
    """

    kernel: Kernel
    given: Inputs
    memory: Memory
    tile: Tile
    number: Any
    head: Any
    token: Any
    first_row: Any
    last_row: Any
    start: Any
    end: Any
    exists: Any
    factor: Any

    @classmethod
    def create(
        cls, kernel: Kernel, given: Inputs, memory: Memory, tile: Tile, number: Any, first_head: Any
    ) -> Consumer:
        first = tile.row + (0 if kernel.paired_heads else number * ROWS)
        token = jnp.minimum(first, given.q.shape[0] - ROWS)  # near the end, rows before its first are not its own
        first_row = jnp.maximum(first, tile.token) - token
        last_row = jnp.minimum(tile.token + tile.num_queries - token, ROWS)
        registers = Registers(kernel.interpret)
        row = registers.of_rows(lax.iota(jnp.int32, ROWS))
        position = jnp.where((row >= first_row) & (row < last_row), tile.position + (token - tile.token) + row, -1)
        visibility = Visibility(kernel.causal, _one(given.sliding_window), _one(given.chunk_size))
        start, end = visibility.interval(position, tile.kv_len)
        head = first_head + (number if kernel.paired_heads else 0)
        return cls(
            kernel=kernel,
            given=given,
            memory=memory,
            tile=tile,
            number=number,
            head=head,
            token=token,
            first_row=first_row,
            last_row=last_row,
            start=registers.of_rows(start),  # which may be the same for all
            end=registers.of_rows(end),
            exists=position >= 0,
            factor=given.factors[0, lax.div(head, kernel.group)],
        )

    @property
    def registers(self) -> Registers:
        return Registers(self.kernel.interpret)

    def run(self, out: Any, lse: Any, index: Any) -> None:
        """Over all steps of the tile, and the result to its place."""
        memory, queries = self.memory, pl.ds(self.token, ROWS)
        plgpu.copy_gmem_to_smem(
            self.given.q.at[queries, self.head], memory.q.at[self.number], memory.q_ready.at[self.number]
        )
        softmax = self.empty()
        plgpu.barrier_wait(memory.q_ready.at[self.number])
        pl.when(self.factor < 0)(self.negate_queries)
        self.take_turn(only=1)
        softmax = lax.fori_loop(self.tile.first_step, self.tile.last_step, self.step, softmax)
        self.take_turn(only=0)
        self.write(softmax, out, lse, index)

    def negate_queries(self) -> None:
        """So that the factor can be taken for positive: then the largest product is the largest logit."""
        rows = self.memory.q.at[self.number]
        rows[...] = -self.registers.matrix(rows[...])
        plgpu.commit_smem()

    def take_turn(self, only: int | None = None) -> None:
        """Wait for the other consumer to come here too; ``only`` one waits in order to fall behind, or to catch up."""
        if not self.kernel.take_turns:
            return

        def meet() -> None:
            plgpu.barrier_arrive(self.memory.turn)
            plgpu.barrier_wait(self.memory.turn)

        meet() if only is None else pl.when(self.number == only)(meet)

    def empty(self) -> Softmax:
        """The softmax over no keys; a sink is one more logit, without a value."""
        registers = self.registers
        highest = registers.of_rows(jnp.full(ROWS, -jnp.inf, jnp.float32))
        if self.given.sinks is not None:
            highest = jnp.where(self.exists, self.given.sinks[self.head], highest)
        total = jnp.where(highest > -jnp.inf, 1.0, 0.0)
        return Softmax(highest, total, registers.matrix(jnp.zeros((ROWS, self.kernel.v_head_dim), jnp.float32)))

    def step(self, step: Any, softmax: Softmax) -> Softmax:
        """``softmax`` over the keys of one step more."""
        memory, shape = self.memory, (ROWS, self.kernel.keys)
        slot = lax.rem(step - self.tile.first_step, self.kernel.stages)
        masked = (step < self.tile.first_whole_step) | (step >= self.tile.last_whole_step)
        plgpu.barrier_wait(memory.k.ready.at[slot])
        logits = self.registers.product(
            memory.q.at[self.number], memory.k.rows.at[slot], transposed=True, meanwhile=self.take_turn
        )
        logits, factor = self.finish(logits)
        logits = lax.cond(masked, lambda x: self.mask(x, slot), lambda x: x, logits)
        plgpu.barrier_arrive(memory.k.used.at[slot])
        highest = jnp.maximum(softmax.highest, jnp.max(logits, axis=1) * factor)
        base = jnp.where(highest == -jnp.inf, 0.0, highest)  # exp(-inf - -inf) is NaN
        weights, decay = jnp.exp2(logits * factor - down_rows(base, shape)), jnp.exp2(softmax.highest - base)
        total = softmax.total * decay + jnp.sum(weights, axis=1)
        weights = weights.astype(memory.v.rows.dtype)
        if self.kernel.take_turns:
            weights, total, decay = lax.optimization_barrier((weights, total, decay))
            plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.v.ready.at[slot])
        if self.kernel.take_turns:
            plgpu.barrier_wait(memory.turn)
        pl.when(masked)(lambda: self.clean(slot))
        values = self.registers.product(weights, memory.v.rows.at[slot])
        plgpu.barrier_arrive(memory.v.used.at[slot])
        return Softmax(highest, total, softmax.values * down_rows(decay, values.shape) + values)

    def finish(self, logits: jax.Array) -> tuple[jax.Array, Any]:
        """Products of q and k as logits in base 2, and a positive factor that they still want."""
        factor = jnp.maximum(jnp.abs(self.factor), _SMALLEST)
        if self.given.cap is None:  # multiplied together with the subtraction of the maximum, it is one operation
            return logits, factor
        cap = self.given.cap[0]
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return (cap * LOG2_E) * (1 - 2 / (jnp.exp2(logits * (factor * (2 * LOG2_E) / cap)) + 1)), 1.0

    def mask(self, logits: jax.Array, slot: Any) -> jax.Array:
        """-inf where a row does not see a key."""
        shape = logits.shape
        position = across_columns(self.registers.of_columns(self.memory.k.positions[slot]), shape)
        seen = (position >= down_rows(self.start, shape)) & (position < down_rows(self.end, shape))
        return jnp.where(seen, logits, -jnp.inf)

    def clean(self, slot: Any) -> None:
        """Zeros for values that no row of the tile sees: a weight of 0 does not hide a NaN, as 0 * NaN is NaN.

        The first consumer, which is never behind the other, does it for both.
        """
        memory, rows = self.memory, min(ROWS, self.kernel.keys)
        shape = (rows, self.kernel.v_head_dim)

        @pl.when(self.number == 0)
        def _() -> None:
            for first in range(0, self.kernel.keys, rows):
                part = pl.ds(first, rows)
                position = self.registers.of_rows(memory.v.positions[slot, part])
                seen = (position >= self.tile.first_seen) & (position < self.tile.last_seen)
                values = self.registers.matrix(memory.v.rows[slot, part])
                zero = jnp.zeros((), values.dtype)
                memory.v.rows.at[slot, part][...] = jnp.where(down_rows(seen, shape), values, zero)
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.cleaned.at[slot])

        pl.when(self.number == 1)(lambda: plgpu.barrier_wait(memory.cleaned.at[slot]))

    def write(self, softmax: Softmax, out: Any, lse: Any, index: Any) -> None:
        """Normalise and store; the next sequence's rows begin where these end, so a part of a tile goes by rows."""
        kernel, memory = self.kernel, self.memory
        factor = self.given.factors[1, lax.div(self.head, kernel.group)]
        factor = jnp.where(softmax.total == 0, 0.0, factor / softmax.total)
        values = (softmax.values * down_rows(factor, softmax.values.shape)).astype(out.dtype)
        base = jnp.where(softmax.highest == -jnp.inf, 0.0, softmax.highest)
        memory.lse.at[self.number][...] = base * (1 / LOG2_E) + jnp.log(softmax.total)
        plgpu.commit_smem()
        place = pl.ds(0 if kernel.paired_heads else self.number * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(memory.lse.at[self.number], lse.at[index, self.head, place])
        if kernel.head_dim == kernel.v_head_dim:
            is_whole = (self.first_row == 0) & (self.last_row == ROWS)
            pl.when(is_whole)(lambda: self.write_whole(values, out))
            pl.when(jnp.logical_not(is_whole))(lambda: self.write_rows(values, out))
        else:
            self.write_rows(values, out)
        plgpu.wait_smem_to_gmem(0)

    def write_whole(self, values: jax.Array, out: Any) -> None:
        """All 64 rows at once, from where the queries were."""
        rows = self.memory.q.at[self.number]
        rows[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows, out.at[pl.ds(self.token, ROWS), self.head])

    def write_rows(self, values: jax.Array, out: Any) -> None:
        """Those rows that are queries, one by one."""
        columns = pl.ds(0, self.kernel.v_head_dim)
        self.memory.out.at[self.number, :, columns][...] = values
        plgpu.commit_smem()

        @pl.loop(self.first_row, self.last_row)
        def _(row: Any) -> None:
            source = self.memory.out.at[self.number, pl.ds(row, 1), columns]
            target = out.at[pl.ds(self.token + row, 1), self.head]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        plgpu.commit_smem_to_gmem_group()


def _one(ref: Any, default: Any = None) -> Any:
    return default if ref is None else ref[0]
