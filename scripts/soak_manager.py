"""Drive one ``KVCacheManager`` through random traffic for a long time, and show that it loses nothing.

    python scripts/soak_manager.py --steps 1000000 --json soak.json

Prompts share prefixes; requests are decoded, forked, cancelled, preempted (by swap and by recompute), and speculate
with drafts of which most are rejected; the pool is compacted, its prefix cache reset and parts of it evicted. Blocks
run out most of the time. Layer 0 has a sliding window, layer 1 sees everything. K and V are written for every token,
a number that depends on all tokens before it, and read back.

Exit status 1: a block was lost, or the process grew by more than ``--growth-bound`` MiB after the first quarter, in
which everything gets compiled. A wrong number, or a part that contradicts another, raises at once.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pyagent_kv_jax import DeviceType, KVCacheConfig, KVCacheManager, LayerGroup, OutOfBlocksError, StepPlan
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.manager import ManagerOptions
from pyagent_kv_jax.manager.kv_cache_manager import PreemptionMode

BLOCK, BLOCKS, HOST_BLOCKS, ROWS, LONGEST, WINDOW = 4, 64, 40, 8, 48, 10
MOST_KNOWN = 2 * ROWS  # requests here or waiting
MOST_TOKENS, MOST_DRAFTS = 8, 3  # of a request in one step
CONFIG = KVCacheConfig(
    num_layers=2,
    num_heads=1,
    head_dim=1,
    num_blocks=BLOCKS,
    block_size=BLOCK,
    max_num_reqs=ROWS,
    max_model_len=LONGEST,
    layer_groups=(LayerGroup((0,), sliding_window=WINDOW), LayerGroup((1,))),
    device=DeviceType.CPU,
)
OPTIONS = ManagerOptions(num_host_blocks=HOST_BLOCKS, event_capacity=64, prediction_horizon=6)
GROWTH_BOUND = 8.0  # MiB; a leak of 16 bytes a step is 12 MiB in 750,000 steps
_COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Report:
    """What a soak found. Memory in MiB, of the process; "warm" is after a quarter of the steps."""

    steps: int
    seed: int
    steps_per_second: float
    compilations: int
    compilations_in_second_half: int
    rss_warm: float
    rss_end: float
    rss_slope_per_million_steps: float
    lost_blocks: int
    lost_host_blocks: int
    counts: dict[str, int]
    rss_samples: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (step, MiB)

    def faults(self, growth_bound: float = GROWTH_BOUND) -> list[str]:
        """What is wrong, in words; empty: nothing."""
        found = []
        if self.lost_blocks or self.lost_host_blocks:
            found.append(f"lost {self.lost_blocks} blocks and {self.lost_host_blocks} host blocks")
        if self.rss_end - self.rss_warm > growth_bound:
            found.append(f"memory grew by {self.rss_end - self.rss_warm:.1f} MiB, want at most {growth_bound}")
        return found


class Request:
    """A request as the traffic knows it: its tokens, what a model would store for each, how far it is.

    ``drafts`` of its tokens, the last ones, are guesses that blocks are reserved for.
    """

    def __init__(self, name: str, prompt: list[int], length: int) -> None:
        self.name, self.length = name, length
        self.tokens: list[int] = []
        self.stored = np.zeros(LONGEST, np.float32)
        self.computed = self.drafts = 0
        self.place = "waiting"  # or "device" or "swapped"
        self.append(prompt)

    def append(self, tokens: list[int]) -> None:
        """Tokens that follow."""
        value = int(self.stored[len(self.tokens) - 1]) if self.tokens else 0
        for token in tokens:
            value = (value * 31 + token + 1) % 1_000_003  # below 2**20: exact in float32, with a quarter too
            self.stored[len(self.tokens)] = value
            self.tokens.append(token)

    def settle(self, accepted: int = 0) -> list[int]:
        """Keep the first ``accepted`` drafts, and return them; forget the others."""
        first = len(self.tokens) - self.drafts
        del self.tokens[first + accepted :]
        self.drafts = 0
        return self.tokens[first:]


class Soak:
    """One manager, and the random traffic on it."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.manager = KVCacheManager(CONFIG, OPTIONS)
        self.requests: dict[str, Request] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.leaving: list[str] = []  # freed by the next step
        self.num_named = 0
        stems = [[self.random.randrange(50) for _ in range(24)] for _ in range(6)]
        self.prefixes = [stem[:length] for stem in stems for length in (24, 16, 9)]

    def step(self) -> None:
        """What happens between two steps of a model, and the step."""
        self._next_tokens()
        self._disturb()
        held = self._at("device")
        batch = (
            held + (self._at("swapped") + self._at("waiting"))[: min(max(ROWS - 1 - len(held), 0), 2)]
        )  # a row stays for forks
        counts = [min(max(len(r.tokens) - r.computed, 0), MOST_TOKENS) for r in batch]
        plan = self.manager.step(
            [request.name for request in batch],
            counts,
            free=self.leaving,
            num_rows=ROWS,
            num_tokens=None if max(counts, default=0) <= 1 else ROWS * MOST_TOKENS,
        )
        self.leaving = []
        self._take_in(plan, batch)
        self.counts["refused"] += int((~plan.ok).sum())
        if held and not plan.ok[0]:  # nobody may move: the last that came gives way
            self._preempt(held[-1:])
        self.manager.events.drain()

    def check(self) -> None:
        """All parts agree, and every token that a request can see is what was written."""
        self.manager.check_invariants()
        for request in self._at("device"):
            self._check_content(request)

    def spot_check(self) -> None:
        """The same of one request."""
        if held := self._at("device"):
            self._check_content(self.random.choice(held))

    def free_all(self) -> None:
        """Let every request go, wherever it is."""
        for name in [*self.requests, *self.leaving]:
            self.manager.free(name)
        self.requests, self.leaving = {}, []
        self.manager.check_invariants()

    def _at(self, place: str) -> list[Request]:
        return [request for request in self.requests.values() if request.place == place]

    # -- what happens between steps ----------------------------------------------------------------------------

    def _next_tokens(self) -> None:
        """Requests that have computed all their tokens choose one more, and some of them guess on."""
        ready = [request for request in self._at("device") if request.computed == len(request.tokens)]
        tokens = [self.random.randrange(4) for _ in ready]
        for request, token in zip(ready, tokens, strict=True):
            request.append([token])
        if ready:
            self.manager.record_tokens([request.name for request in ready], np.array(tokens, np.int32))
        for request in ready:
            if self.random.random() < 0.05:
                self._reserve(request)

    def _reserve(self, request: Request) -> None:
        drafts = self.random.randint(1, MOST_DRAFTS)
        try:
            self.manager.reserve(request.name, drafts)
        except OutOfBlocksError:
            self.counts["reservations refused"] += 1
            return
        request.append([self.random.randrange(4) for _ in range(drafts)])
        request.drafts = drafts

    def _disturb(self) -> None:
        draw, held = self.random.random, self._at("device")
        if len(self.requests) < MOST_KNOWN:
            self._add()
        if held and len(self.manager.request_ids()) < ROWS and draw() < 0.05:
            self._fork(self.random.choice(held))
        if held and draw() < 0.03:
            self._preempt(self.random.sample(held, self.random.randint(1, min(2, len(held)))))
        if draw() < 0.05:
            self._cancel(self.random.choice(list(self.requests.values())))
        if draw() < 0.02:
            self.manager.evict_prefix(np.array(self.random.choice(self.prefixes), np.int32))
            self.counts["prefixes evicted"] += 1
        if draw() < 0.003:
            self.counts["blocks moved"] += self.manager.defragment(runs=draw() < 0.5).num_moved
        if draw() < 0.001:
            self.manager.reset_prefix_cache()
            self.counts["resets"] += 1

    def _name(self) -> str:
        self.num_named += 1
        return f"request-{self.num_named}"

    def _add(self) -> None:
        prompt = self.random.choice(self.prefixes) + [
            self.random.randrange(50) for _ in range(self.random.randint(1, 8))
        ]
        request = Request(self._name(), prompt, self.random.randint(len(prompt) + 1, LONGEST - MOST_DRAFTS))
        self.manager.add_request(request.name, np.array(prompt, np.int32))
        self.requests[request.name] = request
        self.counts["added"] += 1

    def _fork(self, parent: Request) -> None:
        child = Request(self._name(), [], parent.length)
        self.manager.fork(parent.name, child.name)
        parent.settle()
        child.append(parent.tokens)
        child.computed, child.place = parent.computed, "device"
        self.requests[child.name] = child
        self.counts["forks"] += 1

    def _cancel(self, request: Request) -> None:
        del self.requests[request.name]
        self.leaving.append(request.name)
        self.counts[f"cancelled: {request.place}"] += 1

    def _preempt(self, victims: list[Request]) -> None:
        names = [request.name for request in victims]
        mode: PreemptionMode = self.random.choice(("auto", "swap", "recompute"))
        try:
            done = self.manager.preempt(names, mode)
        except OutOfBlocksError:
            self.counts["host pool full"] += 1
            done = self.manager.preempt(names, "recompute")
        for request in victims:
            request.settle()
            if done[request.name] == "swap":
                request.place = "swapped"
            else:
                request.place, request.computed = "waiting", 0
            self.counts[f"preempted: {done[request.name]}"] += 1

    # -- what came of a step -----------------------------------------------------------------------------------

    def _take_in(self, plan: StepPlan, batch: list[Request]) -> None:
        slots = np.asarray(plan.metadata.slot_mapping)
        values, at = np.zeros(slots.shape[1], np.float32), 0
        granted, cached = plan.num_tokens.tolist(), plan.num_cached_tokens.tolist()
        for i, request in enumerate(batch):
            if not plan.ok[i]:
                assert not request.drafts, f"{request.name}: was refused what it had reserved"
                continue
            if request.place == "waiting":
                request.computed = cached[i]
                self.counts["prompt tokens found"] += cached[i]
            self.counts["swapped in"] += request.place == "swapped"
            request.place = "device"
            at = i if len(values) == ROWS else at  # decode layout
            values[at : at + granted[i]] = request.stored[request.computed : request.computed + granted[i]]
            at += granted[i]
            request.computed += granted[i]
        self.manager.pages = _write(self.manager.pages, values, slots)
        self._commit([request for request in batch if request.drafts])
        for request in batch:
            if request.place == "device" and request.computed >= request.length:
                del self.requests[request.name]
                self.leaving.append(request.name)
                self.counts["finished"] += 1

    def _commit(self, speculating: list[Request]) -> None:
        if not speculating:
            return
        drafts = [request.drafts for request in speculating]
        accepted = [self.random.choice((0, 0, self.random.randint(0, count))) for count in drafts]
        self.manager.commit([request.name for request in speculating], accepted)
        for request, count in zip(speculating, accepted, strict=True):
            request.computed -= request.drafts - count
            self.counts["drafts rejected"] += request.drafts - count
            if kept := request.settle(count):
                self.manager.record_tokens(request.name, np.array(kept, np.int32))

    def _check_content(self, request: Request) -> None:
        pages = self.manager.pages
        for layer, first in enumerate((max(request.computed - WINDOW + 1, 0), 0)):
            table = np.array(self.manager.get_block_table(request.name, layer), np.int32)
            positions = np.arange(first, request.computed)
            blocks = table[positions // BLOCK]
            assert (blocks >= 0).all(), f"{request.name}, layer {layer}: lost blocks it needs, has {table.tolist()}"
            want = request.stored[positions] + layer / 4
            for stored, sign in ((pages.k_pages, 1), (pages.v_pages, -1)):
                got = np.asarray(stored)[blocks, 0, positions % BLOCK, 0]
                np.testing.assert_array_equal(got, sign * want, f"{request.name}, layer {layer}")


@partial(jax.jit, donate_argnums=0)
def _write(pages: KVPages, values: jax.Array, slots: jax.Array) -> KVPages:
    """Store ``values`` f32[tokens] at ``slots`` i32[layers, tokens]; each layer another K, and V its negative."""
    for layer in range(CONFIG.num_layers):
        k = values[:, None, None] + layer / 4
        pages = pages.write(layer, k, -k, slots[layer])
    return pages


def run(steps: int, seed: int = 0, *, soak: Soak | None = None, progress: bool = False) -> Report:
    """``steps`` steps, and every request freed."""
    soak = Soak(seed) if soak is None else soak
    compilations = [0]
    samples: list[tuple[int, float]] = []
    at_half = 0

    def count(event: str, duration_secs: float, **_: Any) -> None:
        compilations[0] += event == _COMPILATION

    jax.monitoring.register_event_duration_secs_listener(count)
    start = time.perf_counter()
    try:
        for step in tqdm(range(steps), disable=not progress, mininterval=1.0, unit="step"):
            soak.step()
            if step % 8 == 0:
                soak.spot_check()
            if step % 2000 == 1999:
                soak.check()
            if step % max(steps // 100, 1) == 0:
                samples.append((step, _resident_mib()))
            if step == steps // 2:
                at_half = compilations[0]
        seconds = time.perf_counter() - start
        in_second_half = compilations[0] - at_half
        samples.append((steps, _resident_mib()))
        soak.check()
        soak.free_all()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    warm = np.array([sample for sample in samples if sample[0] >= steps // 4])
    stats = soak.manager.stats()
    soak.counts["cached blocks evicted"], soak.counts["blocks copied on write"] = (
        stats.num_evicted_blocks,
        stats.num_copied_blocks,
    )
    return Report(
        steps=steps,
        seed=seed,
        steps_per_second=steps / seconds,
        compilations=compilations[0],
        compilations_in_second_half=in_second_half,
        rss_warm=float(warm[0, 1]),
        rss_end=float(warm[-1, 1]),
        rss_slope_per_million_steps=float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0] * 1e6),
        lost_blocks=BLOCKS - stats.num_free_blocks,
        lost_host_blocks=HOST_BLOCKS - stats.num_free_host_blocks,
        counts=dict(sorted(soak.counts.items())),
        rss_samples=samples,
    )


def _resident_mib() -> float:
    """Memory of this process; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Run, print, and say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth-bound", type=float, default=GROWTH_BOUND, help="MiB (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps: got {options.steps}, want at least 4")
    report = run(options.steps, options.seed, progress=True)
    faults = report.faults(options.growth_bound)
    for name, value in dataclasses.asdict(report).items():
        if name == "rss_samples":
            continue
        print(
            f"{name.replace('_', ' ')}: {value:.1f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')}: {value}"
        )
    print("; ".join(faults) or "every block free, memory flat")
    if options.json:
        fields = dataclasses.asdict(report) | {"faults": faults, "jax": jax.__version__}
        options.json.write_text(json.dumps(fields, indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
