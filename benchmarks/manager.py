"""What ``KVCacheManager`` costs with the prefix cache on, beside vLLM's manager over the same requests.

    python -m benchmarks.manager --json FILE

Admission: 256 prompts of 1,024 tokens. Ours is one ``step``, slots and tables of 262,144 tokens included; vLLM's is
``get_computed_blocks`` and ``allocate_slots`` for each request, which map no slots. "Cached": all blocks but the last.
Decode: 256 requests gain a token each; in every step 16 of them fill a block, unless it says that all do in one of 16.
Hashing (``add_request`` and ``record_tokens``, which also copy the tokens; vLLM's ``Request`` and
``append_output_token_ids``) is timed apart on both sides. Where vLLM is not installed: its times on a machine of this
kind. The last rows hold the slowest of 10,000 steps against three times their median.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.report import Row, argument_parser, publish
from pyagent_kv_jax import KVCacheConfig, KVCacheManager, ManagerOptions

REQUESTS, PROMPT, BLOCK_SIZE, BLOCKS, MAX_LEN = 256, 1024, 16, 65_536, 4096
ROUNDS, DECODE_STEPS, SLOW_STEPS, HORIZON = 9, 128, 10_000, 16
VLLM_MEASURED_EARLIER_US = {"admission": 22_700.0, "decode": 1_220.0}

Times = dict[str, list[float]]  # microseconds


def prompts_of(round_number: int, stagger: bool) -> list[list[int]]:
    """New ones each round; staggered: 0 to 15 tokens longer, so that their blocks fill in different steps."""
    rng = np.random.default_rng(round_number)
    return [rng.integers(0, 32_000, PROMPT + stagger * (i % BLOCK_SIZE)).tolist() for i in range(REQUESTS)]


class Ours:
    """One manager, as a scheduler would use it."""

    def __init__(self, horizon: int = 0) -> None:
        config = KVCacheConfig(
            num_layers=1,
            num_heads=1,
            head_dim=8,
            num_blocks=BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_reqs=REQUESTS,
            max_model_len=MAX_LEN,
        )
        self.manager = KVCacheManager(config, ManagerOptions(prediction_horizon=horizon))
        self.ids = [f"request-{i}" for i in range(REQUESTS)]
        self.ones = np.ones(REQUESTS, np.int64)
        self.tokens = np.random.default_rng(0).integers(0, 32_000, (64, REQUESTS), np.int32)

    def add(self, prompts: list[list[int]]) -> None:
        """Tell the prompts: hashing."""
        for request_id, prompt in zip(self.ids, prompts, strict=True):
            self.manager.add_request(request_id, prompt)

    def admit(self, num_tokens: int) -> None:
        """All at once, for a step over ``num_tokens`` tokens."""
        counts = np.full(REQUESTS, PROMPT + BLOCK_SIZE)  # more than any has
        plan = self.manager.step(self.ids, counts, num_rows=REQUESTS, num_tokens=num_tokens)
        assert plan.ok.all()

    def tell(self, step: int) -> None:
        """The tokens that were sampled: hashing."""
        self.manager.record_tokens(self.ids, self.tokens[step % 64])

    def decode(self) -> None:
        """One token more for everybody."""
        assert self.manager.step(self.ids, self.ones, num_rows=REQUESTS).ok.all()

    def finish(self) -> None:
        """Everybody goes."""
        self.manager.step([], [], free=self.ids)


class VLLM:
    """vLLM's manager and requests. ImportError where there is none."""

    def __init__(self) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=MAX_LEN,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=True,
        )
        init_none_hash(sha256)
        hasher, sampling = get_request_block_hasher(BLOCK_SIZE, sha256), SamplingParams(max_tokens=MAX_LEN)
        self.make: Callable[[str, list[int]], Any] = lambda name, prompt: Request(
            name, prompt, sampling, None, block_hasher=hasher
        )
        self.requests: list[Any] = []

    def add(self, prompts: list[list[int]]) -> None:
        """Make the requests: hashing."""
        self.requests = [self.make(f"request-{i}", prompt) for i, prompt in enumerate(prompts)]

    def admit(self, num_tokens: int) -> None:
        """Look up and allocate, request by request."""
        del num_tokens
        for request in self.requests:
            blocks, cached = self.manager.get_computed_blocks(request)[:2]
            new = self.manager.allocate_slots(request, request.num_tokens - cached, cached, blocks)
            assert new is not None
        for request in self.requests:
            request.num_computed_tokens = request.num_tokens

    def tell(self, step: int) -> None:
        """The tokens that were sampled: hashing."""
        for request in self.requests:
            request.append_output_token_ids(step)

    def decode(self) -> None:
        """One token more for everybody."""
        for request in self.requests:
            assert self.manager.allocate_slots(request, 1) is not None
        for request in self.requests:
            request.num_computed_tokens += 1

    def finish(self) -> None:
        """Everybody goes."""
        for request in self.requests:
            self.manager.free(request)


def one_round(side: Ours | VLLM, number: int, times: Times) -> None:
    """Admit new prompts, and the same again; admit staggered ones and decode."""

    def timed(name: str, call: Callable[..., None], *args: Any) -> None:
        began = time.perf_counter()
        call(*args)
        times.setdefault(name, []).append((time.perf_counter() - began) * 1e6)

    prompts = prompts_of(2 * number, stagger=False)
    timed("hashing prompts", side.add, prompts)
    timed("admission", side.admit, REQUESTS * PROMPT)
    side.finish()
    side.add(prompts)
    timed("cached admission", side.admit, REQUESTS * BLOCK_SIZE)
    side.finish()
    side.add(prompts_of(2 * number + 1, stagger=True))
    side.admit(REQUESTS * (PROMPT + BLOCK_SIZE))
    for step in range(DECODE_STEPS):
        timed("hashing tokens", side.tell, step)
        timed("decode", side.decode)
    side.finish()


def compare() -> dict[str, dict[str, float]]:
    """Median microseconds of each side, which take turns round by round; the first round warms up."""
    sides: dict[str, Ours | VLLM] = {"ours": Ours(), "reserving": Ours(HORIZON)}
    with contextlib.suppress(ImportError):
        sides["vllm"] = VLLM()
    times: dict[str, Times] = {name: {} for name in sides}
    for number in range(-1, ROUNDS):
        for name, side in sides.items():
            gc.collect()
            gc.disable()
            one_round(side, number + 1, times[name] if number >= 0 else {})
            gc.enable()
    # With blocks in reserve one step in so many takes longer: its mean is what a step costs.
    average = {name: statistics.mean if name == "reserving" else statistics.median for name in times}
    return {name: {what: average[name](taken) for what, taken in found.items()} for name, found in times.items()}


def comparison_rows() -> Iterator[Row]:
    """Ours beside vLLM's."""
    found = compare()
    ours, vllm = found["ours"], found.get("vllm", VLLM_MEASURED_EARLIER_US)
    name = "vLLM" if "vllm" in found else "vLLM, measured earlier on such a machine, not in this run"
    for what, case in {
        "admission": "admission of 256 prompts of 1,024 tokens",
        "cached admission": "admission of 256 prompts of 1,024 tokens, cached",
        "decode": "decode step of 256 requests",
        "hashing prompts": "hashing 256 prompts of 1,024 tokens",
        "hashing tokens": "hashing one token of 256 requests",
    }.items():
        baseline = vllm.get(what)
        yield Row(case, ours[what], None if baseline is None else name, baseline)
    ahead, steps = found["reserving"]["decode"], f"blocks reserved for {HORIZON} steps at a time, mean"
    yield Row(f"decode step of 256 requests, {steps}", ahead, name, vllm["decode"])


def slow_step_rows(stagger: bool, collect: bool) -> Iterator[Row]:
    """p99 and the worst of 10,000 decode steps, in rounds of 2,500, hashing apart."""
    ours, taken = Ours(), []
    for number in range(SLOW_STEPS // 2_500 + 1):
        ours.add(prompts_of(number, stagger))
        ours.admit(REQUESTS * (PROMPT + BLOCK_SIZE))
        gc.collect()
        if not collect:
            gc.disable()
        for step in range(2_500 if number else 50):  # the first round warms up
            ours.tell(step)
            began = time.perf_counter()
            ours.decode()
            taken += [(time.perf_counter() - began) * 1e6] * (number > 0)
        gc.enable()
        ours.finish()
    case = f"of 10,000 decode steps{'' if stagger else ', all blocks full at once'}, gc {'on' if collect else 'off'}"
    median = statistics.median(taken)
    yield Row(f"p99 {case}", float(np.quantile(taken, 0.99)), "3 x median", 3 * median)
    yield Row(f"worst {case}", max(taken), "3 x median", 3 * median)


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    args: Any = argument_parser(__doc__).parse_args(argv)
    rows = list(comparison_rows())
    for stagger, collect in [(True, True), (True, False), (False, True)]:
        rows += slow_step_rows(stagger, collect)
    publish(rows, args.json)


if __name__ == "__main__":
    main()
