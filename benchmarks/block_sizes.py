"""Fixed block sizes beside the adaptive one: bytes wasted, and attention time. A part of ``benchmarks.tables``.

Bytes: the empty ends of the last blocks of all requests, times the K and V of Llama-3-8B, and the dense table.
Attention: decode over 56 requests of the traffic (those below 6,000 tokens) in float32, heads as in Llama-3-8B, one
layer, through tables as they are after 3,000 decode steps in which requests come and go and blocks are handed out as
``BlockPool`` does it, first freed, first taken.

The adaptive one has kernel blocks of 8 and what ``BlockSizeChooser`` makes of the lengths. Requests keep their blocks
in runs, as by ``defragment(runs=True, below=0.9)`` every 16 steps. What that copies is measured too, and spread over
the steps.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import traffic
from benchmarks.report import median_us, medians_us
from pallas_kernels import paged_attention, paged_copy
from pyagent_kv_jax import BlockSizeChooser, KVCacheConfig

SIZES, KERNEL_BLOCK = (8, 16, 32, 64, 128), 8
REQUESTS, LONGEST, STEPS, SEED = 56, 6_000, 3_000, 1
BYTES_PER_TOKEN, Q_HEADS, KV_HEADS, HEAD_DIM = 131_072, 32, 8, 128
LEAST_RUN_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Size:
    """What one block size costs.

    Attributes:
        name: the size, or that it is the adaptive one.
        waste_bytes: empty slots of all requests.
        table_bytes: of all their rows.
        attention_us: of 1,000 tokens of context, copies for the sake of runs included.
        copies_us: those alone.
    """

    name: str
    waste_bytes: int
    table_bytes: int
    attention_us: float
    copies_us: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Waste and tables."""
        return self.waste_bytes + self.table_bytes

    def as_dict(self) -> dict[str, Any]:
        """For the file."""
        times = {name: round(getattr(self, name), 1) for name in ("attention_us", "copies_us")}
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes, **times}


@dataclasses.dataclass
class Served:
    """Requests that come and go in one pool.

    Attributes:
        block_size: tokens of a block.
        keeps_runs: whether blocks are moved so that each request's stand in a run.
        moved: blocks moved for that.
        last_moved: those of the last time.
    """

    block_size: int
    keeps_runs: bool
    moved: int = 0
    last_moved: int = 0

    def __post_init__(self) -> None:
        flow = traffic.lengths(64 * REQUESTS, SEED)
        short = flow.prompts + flow.outputs < LONGEST
        self._coming = iter(zip(flow.prompts[short].tolist(), flow.outputs[short].tolist(), strict=True))
        self.num_blocks = REQUESTS * 2_400 // self.block_size
        self._free = deque(range(self.num_blocks))
        self.lengths, self._left = [0] * REQUESTS, [0] * REQUESTS
        self.blocks: list[list[int]] = [[] for _ in range(REQUESTS)]
        for step in range(STEPS):
            self._step()
            if self.keeps_runs and step % 16 == 15 and self.run_share() < LEAST_RUN_SHARE:
                self._defragment()

    def _step(self) -> None:
        for row in range(REQUESTS):
            if self._left[row] == 0:
                self._free.extend(reversed(self.blocks[row]))
                self.blocks[row] = []
                self.lengths[row], self._left[row] = next(self._coming)
            else:
                self.lengths[row] += 1
                self._left[row] -= 1
            while len(self.blocks[row]) * self.block_size < self.lengths[row]:
                self.blocks[row].append(self._free.popleft())

    def run_share(self) -> float:
        """Blocks that stand right behind the one before, among those that have one before."""
        steps = np.concatenate([np.diff(blocks) for blocks in self.blocks])
        return float((steps == 1).mean())

    def _defragment(self) -> None:
        old = np.concatenate(self.blocks)
        self.last_moved = int((old != np.arange(len(old))).sum())
        self.moved += self.last_moved
        ends = np.cumsum([len(blocks) for blocks in self.blocks]).tolist()
        self.blocks = [list(range(end - len(blocks), end)) for blocks, end in zip(self.blocks, ends, strict=True)]
        self._free = deque(range(ends[-1], self.num_blocks))


class Decode:
    """One decode step over what is served, in pages of ``page`` tokens."""

    def __init__(self, served: Served, page: int) -> None:
        self.served, self._pages_per_block = served, served.block_size // page
        k = self._pages_per_block
        table = np.full((REQUESTS, max(map(len, served.blocks)) * k), -1, np.int32)
        for row, blocks in zip(table, served.blocks, strict=True):
            row[: len(blocks) * k] = (np.array(blocks)[:, None] * k + np.arange(k)).ravel()
        keys = jax.random.split(jax.random.key(SEED), 3)
        shape = (served.num_blocks * k, KV_HEADS, page, HEAD_DIM)
        self._pages = tuple(jax.random.normal(key, shape) for key in keys[:2])
        self._q = jax.random.normal(keys[2], (REQUESTS, Q_HEADS, HEAD_DIM))
        self._rows = jnp.asarray(table), jnp.asarray(served.lengths, jnp.int32)
        self._attend = jax.jit(lambda *arrays: paged_attention(*arrays))

    def __call__(self) -> jax.Array:
        """The outputs."""
        return self._attend(self._q, *self._pages, *self._rows)

    def copies_us(self) -> float:
        """Of one step: what keeping runs copies, spread over all steps."""
        if not self.served.moved:
            return 0.0
        rng, pages = np.random.default_rng(SEED), list(self._pages)
        ids = rng.permutation(pages[0].shape[0])[: self.served.last_moved * self._pages_per_block].astype(np.int32)
        copy = jax.jit(paged_copy, donate_argnums=0)

        def once() -> jax.Array:
            pages[:] = copy(tuple(pages), ids, np.sort(ids))
            return pages[0]

        return median_us(once, repeats=5) / self.served.last_moved * self.served.moved / STEPS


def compare(lengths: np.ndarray) -> list[Size]:
    """Each fixed size, and the adaptive one last; ``lengths`` i64[n] are those of all requests."""
    chooser = BlockSizeChooser(
        KVCacheConfig(
            num_layers=32,
            num_heads=8,
            head_dim=128,
            num_blocks=2**18,
            block_size=KERNEL_BLOCK,
            kernel_block_size=KERNEL_BLOCK,
            max_model_len=traffic.LONGEST,
            max_num_reqs=len(lengths),
        ),
        relative_times={1: 1.0},  # in runs, pages of 8 take as long whatever k is
    )
    chooser.observe(lengths)
    chosen = chooser.choose()
    names = {**{size: f"blocks of {size}" for size in SIZES}, 0: f"adaptive: {chosen}, in runs"}
    decodes = {size: Decode(Served(size, keeps_runs=False), size) for size in SIZES}
    decodes[0] = Decode(Served(chosen, keeps_runs=True), KERNEL_BLOCK)
    times = medians_us({str(size): decode for size, decode in decodes.items()}, repeats=21)
    found = []
    for size, decode in decodes.items():
        tokens, block_size = sum(decode.served.lengths) / 1000, size or chosen
        copies = decode.copies_us()
        waste = int((-(-lengths // block_size) * block_size - lengths).sum()) * BYTES_PER_TOKEN
        table = len(lengths) * traffic.LONGEST // block_size * 4
        found.append(Size(names[size], waste, table, (times[str(size)] + copies) / tokens, copies / tokens))
    return found


def table(sizes: list[Size]) -> str:
    """For reading."""
    head = f"{'':22}{'K/V waste':>12}{'tables':>12}{'together':>12}{'attention of 1,000 tokens':>28}"
    mib = [[f"{value / 2**20:,.0f} MiB" for value in (s.waste_bytes, s.table_bytes, s.total_bytes)] for s in sizes]
    lines = [
        f"{size.name:22}{waste:>12}{tables:>12}{total:>12}{size.attention_us:>19.0f} us"
        + (f" ({size.copies_us:.0f} of them copies)" if size.copies_us else "")
        for size, (waste, tables, total) in zip(sizes, mib, strict=True)
    ]
    return "\n".join([head, *lines])
