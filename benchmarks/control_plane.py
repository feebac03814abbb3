"""Admit, append and map slots: what one decode step of 256 requests costs on the host.

    python -m benchmarks.control_plane --json FILE

Contexts are log-normal (median 2,000 tokens) over 65,536 blocks of 16. Of each 16 steps a row takes a block in one;
"every row takes a block" is the worst step. "On the device": steps are dispatched one after another and waited for
together. "On the host": slots and ``ok`` are read back after each step. "In one scan": 64 steps, one dispatch.

Baselines, in the same run: ``allocate_slots`` of vLLM's ``KVCacheManager``, one call a request, which neither appends
to a table nor maps slots (where vLLM is not installed: its figure on a machine of this kind); and the least that plain
Python can do, lists and a deque, without reference counts. The last rows hold the pool's size against its cost.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Row, argument_parser, publish
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.pool import BlockPool
from pyagent_kv_jax.tables import BlockTable, append_rows, slots_of
from pyagent_kv_jax.tables.host_step import CONTROL_STEP_ON_CPU

REQUESTS, BLOCKS, BLOCK_SIZE, WIDTH = 256, 65_536, 16, 2048
STEPS, ROUNDS, SCANNED = 64, 20, 64
VLLM_MEASURED_EARLIER_US = 1170.0

State = tuple[BlockPool, BlockTable]
Burst = Callable[[], float]  # runs some steps, returns microseconds a step


def context_lengths(median: float) -> NDArray[np.int32]:
    """Tokens of each request: log-normal, with room left in the pool and in the row."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.6, REQUESTS)
    return np.clip(lengths, 1, WIDTH * BLOCK_SIZE // 2).astype(np.int32)


def start(num_blocks: int, lengths: NDArray[np.int32]) -> State:
    """A pool and a table that hold these contexts."""
    counts = -(-lengths // BLOCK_SIZE)
    pool, admitted = BlockPool.create(num_blocks).allocate(counts, capacity=int(counts.sum()))
    table = BlockTable.create(BlockTableConfig(BLOCK_SIZE, REQUESTS, WIDTH))
    table, ok = jax.jit(append_rows)(table, admitted.ids, admitted.row_offsets, lengths)
    assert admitted.ok.all()
    assert ok.all()
    return pool, table


def decode_step(new_tokens: int, state: State) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Each request gains ``new_tokens``; (slots i32[256] of the last of them, ok bool[256])."""
    pool, table = state
    needed = (table.num_tokens + new_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE - table.num_blocks
    pool, admitted = pool.admit(needed, capacity=REQUESTS)
    table, _ = append_rows(table, admitted.ids, admitted.row_offsets, new_tokens * admitted.ok)
    slots = slots_of(table, jnp.arange(REQUESTS, dtype=jnp.int32), table.num_tokens - 1)
    return (pool, table), (slots, admitted.ok)


@dataclasses.dataclass
class Ours:
    """The steps of this library, each burst from the same state."""

    initial: State
    new_tokens: int

    def __post_init__(self) -> None:
        options = CONTROL_STEP_ON_CPU if jax.default_backend() == "cpu" else None
        step = partial(decode_step, self.new_tokens)

        def many(state: State) -> tuple[State, Any]:
            return jax.lax.scan(lambda state, _: step(state), state, length=SCANNED)

        self.step = jax.jit(step, donate_argnums=0, compiler_options=options)
        self.scan = jax.jit(many, donate_argnums=0, compiler_options=options)

    def _copy(self) -> State:
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.initial))

    def on_device(self) -> float:
        state = self._copy()
        began = time.perf_counter()
        for _ in range(STEPS):
            state, out = self.step(state)
        jax.block_until_ready((state, out))
        return (time.perf_counter() - began) * 1e6 / STEPS

    def on_host(self) -> float:
        state = self._copy()
        began = time.perf_counter()
        for _ in range(STEPS):
            state, (slots, ok) = self.step(state)
            np.asarray(slots), np.asarray(ok)
        return (time.perf_counter() - began) * 1e6 / STEPS

    def in_one_scan(self) -> float:
        state = self._copy()
        began = time.perf_counter()
        jax.block_until_ready(self.scan(state))
        return (time.perf_counter() - began) * 1e6 / SCANNED

    def slots(self) -> NDArray[np.int32]:
        """i32[STEPS, 256], to compare."""
        state, slots = self._copy(), []
        for _ in range(STEPS):
            state, out = self.step(state)
            slots.append(np.asarray(out[0]))
        return np.stack(slots)


class PlainPython:
    """Lists and a deque: no reference counts, no refusals, no cached content."""

    def __init__(self, num_blocks: int, lengths: NDArray[np.int32], new_tokens: int) -> None:
        self.lengths, self.new_tokens = lengths.tolist(), new_tokens
        self.num_blocks, self.used = num_blocks, int((-(-lengths // BLOCK_SIZE)).sum())

    def steps(self) -> Iterator[NDArray[np.int32]]:
        """The slots of each step."""
        free = collections.deque(range(self.num_blocks))
        rows = [[free.popleft() for _ in range(-(-length // BLOCK_SIZE))] for length in self.lengths]
        tokens = list(self.lengths)
        while True:
            slots = []
            for row, blocks in enumerate(rows):
                tokens[row] += self.new_tokens
                last = tokens[row] - 1
                while len(blocks) * BLOCK_SIZE <= last:
                    blocks.append(free.popleft())
                slots.append(blocks[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE)
            yield np.array(slots, np.int32)

    def burst(self) -> float:
        steps = self.steps()
        next(steps)
        began = time.perf_counter()
        for _ in range(STEPS):
            next(steps)
        return (time.perf_counter() - began) * 1e6 / STEPS

    def slots(self) -> NDArray[np.int32]:
        """i32[STEPS, 256], to compare."""
        return np.stack(list(itertools.islice(self.steps(), STEPS)))


def vllm_burst(lengths: NDArray[np.int32], new_tokens: int) -> Burst:
    """``KVCacheManager.allocate_slots`` for each request, without prefix caching. ImportError where there is none."""
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = KVCacheManager(
        config,
        max_model_len=WIDTH * BLOCK_SIZE,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=False,
    )

    def begin() -> list[Request]:
        requests = []
        for row, length in enumerate(lengths.tolist()):
            request = Request(str(row), [1] * length, SamplingParams(max_tokens=WIDTH * BLOCK_SIZE), None)
            assert manager.allocate_slots(request, length) is not None
            request.num_computed_tokens = length
            requests.append(request)
        return requests

    def burst() -> float:
        spent, requests = 0.0, begin()
        for _ in range(STEPS):
            for request in requests:
                request.append_output_token_ids([1] * new_tokens)
            began = time.perf_counter()
            for request in requests:
                assert manager.allocate_slots(request, new_tokens) is not None
            spent += time.perf_counter() - began
            for request in requests:
                request.num_computed_tokens += new_tokens
        for request in requests:
            manager.free(request)
        return spent * 1e6 / STEPS

    return burst


def take_turns(bursts: dict[str, Burst]) -> dict[str, float]:
    """Median over the rounds, after one to warm up; in turns, so that a busy machine is fair to all.

    Garbage is collected between bursts and not within, as ``timeit`` has it.
    """
    for burst in bursts.values():
        burst()
    taken: dict[str, list[float]] = {name: [] for name in bursts}
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(ROUNDS):
        for name, burst in bursts.items():
            taken[name].append(burst())
            gc.collect()
    gc.enable()
    return {name: statistics.median(times) for name, times in taken.items()}


def decode_rows(what: str, lengths: NDArray[np.int32], new_tokens: int) -> Iterator[Row]:
    """Our three ways beside both baselines."""
    ours, plain = Ours(start(BLOCKS, lengths), new_tokens), PlainPython(BLOCKS, lengths, new_tokens)
    np.testing.assert_array_equal(ours.slots(), plain.slots())
    bursts = {"on the device": ours.on_device, "on the host": ours.on_host, "plain": plain.burst}
    if new_tokens == 1:
        bursts["in one scan"] = ours.in_one_scan
    name = "vLLM allocate_slots"
    try:
        bursts["vllm"] = vllm_burst(lengths, new_tokens)
    except ImportError:
        name = "vLLM, measured earlier on such a machine, not in this run"
    times = {"vllm": VLLM_MEASURED_EARLIER_US} | take_turns(bursts)
    for way in ("on the device", "on the host", "in one scan"):
        if way in times:
            yield Row(f"decode step, {what}, {way}", times[way], name, times["vllm"])
            yield Row(f"decode step, {what}, {way}", times[way], "plain Python lists", times["plain"])


def pool_size_rows() -> Iterator[Row]:
    """The same step over a small pool and a large one."""
    lengths = context_lengths(200)
    steps = {n: Ours(start(n, lengths), 1) for n in (10_000, 1_000_000)}
    for way in ("on_device", "in_one_scan"):
        times = take_turns({str(n): getattr(ours, way) for n, ours in steps.items()})
        what = f"decode step over 1,000,000 blocks, {way.replace('_', ' ')}"
        yield Row(what, times["1000000"], "over 10,000 blocks", times["10000"])


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    args: Any = argument_parser(__doc__).parse_args(argv)
    lengths = context_lengths(2000)
    rows = list(decode_rows("1 row in 16 takes a block", lengths, 1))
    rows += decode_rows("every row takes a block", lengths // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE, BLOCK_SIZE)
    rows += pool_size_rows()
    publish(rows, args.json)


if __name__ == "__main__":
    main()
