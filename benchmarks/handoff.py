"""Handing 256 MiB of blocks from one process to another, beside the bare pull of as many bytes.

    python -m benchmarks.handoff --json FILE

Ours is the whole path of a prompt that the prefill process has cached: asked for over the control channel, leased, read
out of scattered blocks of the pool, pulled, written into scattered blocks of the other pool, entered into its prefix
cache, released. The baseline is ``jax.experimental.transfer`` alone: arrays that stand ready, pulled into new memory;
whole (one of K, one of V), and in parts of several sizes, some under way at a time. The fastest of these counts. Both
processes share this machine's cores.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import secrets
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.report import Row, argument_parser, fastest, publish
from pyagent_kv_jax import KVCacheConfig, KVCacheManager
from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.distributed.handoff.bulk_transfer import BulkEndpoint
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.handoff import LoadOptions, PrefillServer, RemoteLink
from pyagent_kv_jax.serving.handoff.block_load import BlockLoad
from pyagent_kv_jax.serving.handoff.prefill_instance import identity_of

MOVED_BYTES = 256 << 20
CACHE = KVCacheConfig(32, 8, 128, num_blocks=1, block_size=16, max_num_reqs=8, max_model_len=8192)  # of Llama-3-8B
NUM_BLOCKS = MOVED_BYTES // CACHE.block_size_bytes()
PARTS = {"whole": 1, "32 MiB": 8, "16 MiB": 16, "8 MiB": 32}
IN_FLIGHT = 3
PAUSE = 0.001  # seconds between looks
_NAME = "no model computes anything here"


def make_engine() -> Engine:
    """An engine that only lends its cache, a quarter larger than what is moved."""
    model = LlamaForCausalLM(LlamaConfig(32, 16, 16, 1, 1, 1, 16), rngs=nnx.Rngs(0))
    manager = KVCacheManager(dataclasses.replace(CACHE, num_blocks=NUM_BLOCKS * 5 // 4))
    return Engine(model, manager, EngineConfig(max_num_seqs=4, token_budget=64))


def prompt() -> np.ndarray:
    """As many full blocks as are moved, and one token."""
    return np.arange(NUM_BLOCKS * CACHE.block_size + 1, dtype=np.int32) % 32


def scattered(manager: KVCacheManager) -> None:
    """Leave free blocks in random order."""
    rng = np.random.default_rng(0)
    names = [f"block {i}" for i in range(manager.config.pool_blocks)]
    for start in range(0, len(names), 4):  # few rows: in several goes
        held = names[start : start + 4]
        for name in held:
            manager.allocate(name, CACHE.block_size)
        for name in rng.permutation(held):
            manager.free(str(name))


def prefill(pipe: Connection, token: str) -> None:
    """The prefill process: serves; told a number, it makes arrays of that many parts ready to be pulled."""
    engine = make_engine()
    manager = engine.backend
    assert isinstance(manager, KVCacheManager)
    scattered(manager)
    rng = np.random.default_rng(1)
    pages = manager.pages
    k, v = (jax.device_put(rng.random(x.shape, np.float32), x.sharding) for x in (pages.k_pages, pages.v_pages))
    manager.pages = dataclasses.replace(pages, k_pages=k, v_pages=v)
    tokens = prompt()
    manager.add_request("the prompt", tokens)
    manager.allocate("the prompt", len(tokens))  # as if its blocks had been computed
    server = PrefillServer(engine, _NAME, token)
    bulk = BulkEndpoint(jax.devices()[0])
    pipe.send((server.address, bulk.address))
    while True:
        server.serve(until=pipe.poll)
        pipe.send(_ready_parts(bulk, pipe.recv()))


def _ready_parts(bulk: BulkEndpoint, count: int) -> list[int]:
    shape = (CACHE.num_layers, NUM_BLOCKS // count, CACHE.num_heads, CACHE.block_size, CACHE.head_dim)
    parts = [Blocks(jnp.full(shape, i, jnp.uint32), jnp.full(shape, i, jnp.uint32)) for i in range(count)]
    return [bulk.put(Blocks(*part)) for part in jax.block_until_ready(parts)]


class Decode:
    """This process's side."""

    def __init__(self, pipe: Connection, token: str) -> None:
        self.engine = make_engine()
        assert isinstance(self.engine.backend, KVCacheManager)
        self.manager = self.engine.backend
        scattered(self.manager)
        address, self._bulk_address = pipe.recv()
        self._pipe = pipe
        self._bulk = BulkEndpoint(jax.devices()[0])
        self.link = RemoteLink(address, token, self.engine)
        self.link.introduce(identity_of(self.manager, _NAME))
        self._loads = 0
        self._ready: list[int] = []

    def handoff(self, options: LoadOptions) -> Any:
        """All of ours; the pages."""
        self._loads += 1
        load = BlockLoad(self.manager, self.link, self._loads, prompt(), options, time.monotonic)
        while not load.is_done:
            messages = self.link.poll()
            for message in messages:
                load.receive(message)
            if not load.advance() and not messages:
                self.link.wait(PAUSE)
        assert load.num_fetched == NUM_BLOCKS
        jax.block_until_ready(self.manager.pages)
        load.close()
        return self.manager.pages

    def forget(self) -> None:
        """So that it is sent again."""
        self.manager.reset_prefix_cache()

    def get_ready(self, count: int) -> None:
        """Have the other side make so many parts ready."""
        self._pipe.send(count)
        self._ready = self._pipe.recv()

    def bare(self) -> list[Blocks]:
        """Pull what is ready."""
        each, arrived = NUM_BLOCKS // len(self._ready), []
        for uuid in self._ready:
            arrived.append(self._bulk.pull(self._bulk_address, uuid, CACHE, each)._arrays)
            if len(arrived) >= IN_FLIGHT:
                jax.block_until_ready(arrived[-IN_FLIGHT])
        return jax.block_until_ready(arrived)

    def check(self, options: LoadOptions) -> None:
        """Every block has come, and is what it was: the numbers were drawn from a known seed."""
        self.handoff(options)
        keys = self.manager._state.hasher.start()
        keys.extend(prompt()[:-1])
        blocks = self.manager._state.prefixes.blocks_of(keys)[0]
        assert (blocks >= 0).all()
        size = self.manager.config.pool_blocks
        mine = np.asarray(self.manager.pages.k_pages).reshape(CACHE.num_layers, size, -1)[:, blocks, :4]
        theirs = np.random.default_rng(1).random(self.manager.pages.k_pages.shape, np.float32)
        theirs = theirs.reshape(CACHE.num_layers, size, -1)[..., :4]
        order = {theirs[0, block].tobytes(): block for block in range(size)}
        source = [order[mine[0, i].tobytes()] for i in range(len(blocks))]
        assert len(set(source)) == len(source)
        np.testing.assert_array_equal(mine, theirs[:, source])
        self.forget()


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    context, token = multiprocessing.get_context("spawn"), secrets.token_hex()
    pipe, its_end = context.Pipe()
    process = context.Process(target=prefill, args=(its_end, token), daemon=True)
    process.start()
    try:
        decode, options = Decode(pipe, token), LoadOptions()
        decode.check(options)
        times = _times(decode, options, arguments.repeats)
        decode.link.close()
    finally:
        process.kill()
        process.join()
    _, limit_us = fastest(times, [f"bare, {name}" for name in PARTS])
    mib = MOVED_BYTES / 2**20
    what = f"{mib:.0f} MiB, {NUM_BLOCKS} blocks of Llama-3-8B in float32"
    row = Row(what, times["ours"], "jax.experimental.transfer, one pull", times["bare, whole"], limit_us)
    rates = {name: round(mib / us * 1e6) for name, us in times.items()}
    print(rates)
    publish([row], arguments.json, mib_per_second=rates)


def _times(decode: Decode, options: LoadOptions, repeats: int) -> dict[str, float]:
    """Medians, the calls in turn; what has to be made ready is not timed."""
    taken: dict[str, list[float]] = {}

    def timed(name: str, before: Callable[[], None], call: Callable[[], Any]) -> None:
        before()
        start = time.perf_counter()
        call()
        taken.setdefault(name, []).append((time.perf_counter() - start) * 1e6)

    for _ in range(repeats + 2):
        timed("ours", decode.forget, lambda: decode.handoff(options))
        for name, count in PARTS.items():
            timed(f"bare, {name}", lambda count=count: decode.get_ready(count), decode.bare)  # type: ignore[misc]
    return {name: float(np.median(each[2:])) for name, each in taken.items()}


if __name__ == "__main__":
    main()
