"""Swapping 1 GiB of blocks out to host memory and in again, beside ``jax.device_put`` of one array of as many bytes.

    python -m benchmarks.swap --json FILE

Blocks of Llama-3-8B (32 layers, 8 KV heads of 128, 16 tokens), scattered over both pools, moved by ``KVCacheTransfer``
as the manager moves them: the target is donated, so its memory is there already. The baseline gets the same courtesy:
``device_put`` in a jit that donates memory to put into, written before. Called plainly, ``device_put`` also takes new
memory each time, which costs page faults on a CPU (a row of its own). The limit, on CPUs: numpy's ``copyto`` into
memory written before, the faster of one thread and a thread a core.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.report import Row, argument_parser, fastest, medians_us, publish
from pyagent_kv_jax import DType, KVCacheConfig, KVPages
from pyagent_kv_jax.cache.host_pages import HOST_MEMORY
from pyagent_kv_jax.cache.kv_cache_transfer import KVCacheTransfer

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
MOVED_BYTES = 2**30
DTYPES = DType.BFLOAT16, DType.INT8

Calls = dict[str, Callable[[], Any]]


class Swaps:
    """The blocks, and the calls that move them; both pools a quarter larger than what is moved."""

    def __init__(self, dtype: DType) -> None:
        rng = np.random.default_rng(0)
        config = KVCacheConfig(LAYERS, KV_HEADS, HEAD_DIM, num_blocks=1, block_size=BLOCK_SIZE, dtype=dtype)
        count = MOVED_BYTES // config.block_size_bytes()
        config = dataclasses.replace(config, num_blocks=count * 5 // 4)
        empty = KVPages.create(config)
        k_pages, v_pages = (_random_bits(rng, x) for x in (empty.k_pages, empty.v_pages))
        self.pages = dataclasses.replace(empty, k_pages=k_pages, v_pages=v_pages)
        self.transfer = KVCacheTransfer(config, config.pool_blocks)
        self.gpu_ids, self.cpu_ids, self.back = (rng.permutation(config.pool_blocks)[:count] for _ in range(3))

    def out(self) -> Any:
        self.transfer.swap_out(self.pages, self.gpu_ids, self.cpu_ids)
        return self.transfer.host

    def into(self) -> Any:
        self.pages = self.transfer.swap_in(self.pages, self.cpu_ids, self.back)
        return self.pages

    def out_and_in(self) -> Any:
        self.out()
        return self.into()

    def check(self) -> None:
        """What went out comes in, elsewhere, bit for bit, and no other block changes."""
        wanted = self._blocks()
        wanted[:, :, self.back] = wanted[:, :, self.gpu_ids]
        self.out_and_in()
        np.testing.assert_array_equal(self._blocks(), wanted)

    def _blocks(self) -> np.ndarray:
        """u8[2, layers, blocks, bytes], a copy."""
        k, v = (np.array(x).view(np.uint8) for x in (self.pages.k_pages, self.pages.v_pages))
        return np.stack([k, v]).reshape(2, LAYERS, self.pages.config.pool_blocks, -1)


class DevicePut:
    """One array of as many bytes, put to the host and back."""

    def __init__(self, dtype: Any) -> None:
        device = jax.devices()[0]
        self.on_host = SingleDeviceSharding(device, memory_kind=HOST_MEMORY)
        self.on_device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        values = np.zeros(MOVED_BYTES // dtype.itemsize, dtype)
        self.array, self.target = (jax.device_put(values, self.on_device, may_alias=False) for _ in range(2))
        self.host = jax.device_put(values, self.on_host, may_alias=False)
        self._put_out, self._put_in = _put_into(self.on_host), _put_into(self.on_device)

    def out(self) -> Any:
        self.host = self._put_out(self.array, self.host)
        return self.host

    def into(self) -> Any:
        self.target = self._put_in(self.host, self.target)
        return self.target

    def out_and_in(self) -> Any:
        self.out()
        return self.into()

    def plainly(self) -> Any:
        return jax.device_put(jax.device_put(self.array, self.on_host), self.on_device)


def _put_into(sharding: SingleDeviceSharding) -> Callable[..., jax.Array]:
    """``device_put`` of its first argument into the memory of its second, which is donated."""
    return jax.jit(
        lambda array, _: jax.device_put(array, sharding), donate_argnums=1, out_shardings=sharding, keep_unused=True
    )


def _random_bits(rng: np.random.Generator, like: jax.Array) -> jax.Array:
    bits = rng.integers(0, 256, like.nbytes, np.uint8).view(like.dtype).reshape(like.shape)
    return jax.device_put(bits, like.sharding, may_alias=False)


def memory_copies() -> Calls:
    """Ways to copy as many bytes within the host's memory."""
    source, target = np.ones(MOVED_BYTES, np.uint8), np.ones(MOVED_BYTES, np.uint8)
    cores = os.cpu_count() or 1
    threads = concurrent.futures.ThreadPoolExecutor(cores)
    parts = np.array_split(target, cores), np.array_split(source, cores)
    return {
        "copyto": lambda: np.copyto(target, source),
        "copyto in threads": lambda: list(threads.map(np.copyto, *parts)),
    }


def measure(dtype: DType) -> tuple[list[Row], dict[str, float]]:
    """A row for each direction and for both, and all the times they were made from."""
    swaps = Swaps(dtype)
    swaps.check()
    put = DevicePut(swaps.pages.k_pages.dtype)
    copies = memory_copies() if jax.default_backend() == "cpu" else {}
    moves = {"out": ("out", 1), "in": ("into", 1), "out and in": ("out_and_in", 2)}
    calls = {f"{who} {move}": getattr(x, name) for move, (name, _) in moves.items() for who, x in _both(swaps, put)}
    times = medians_us({**calls, **copies})
    apart = medians_us({"ours": swaps.out_and_in, "device_put": put.plainly}, repeats=3, warmup=0)
    what = f"1 GiB, {len(swaps.gpu_ids)} blocks of Llama-3-8B, {dtype.value}"
    rows = []
    for move, (_, ways) in moves.items():
        limit = fastest(times, copies)[1] * ways if copies else None
        name = "device_put, donated memory"
        rows.append(Row(f"{move}, {what}", times[f"ours {move}"], name, times[f"device_put {move}"], limit))
    rows.append(Row(f"out and in, {what}", apart["ours"], "device_put, new memory", apart["device_put"]))
    return rows, {**times, **{f"{name}, plain": us for name, us in apart.items()}}


def _both(swaps: Swaps, put: DevicePut) -> tuple[tuple[str, Swaps], tuple[str, DevicePut]]:
    return ("ours", swaps), ("device_put", put)


def main() -> None:
    """Measure, print, write."""
    arguments = argument_parser(__doc__).parse_args()
    rows, all_times = [], {}
    for dtype in DTYPES:
        measured, times = measure(dtype)
        rows += measured
        all_times[dtype.value] = {call: round(us) for call, us in times.items()}
    publish(rows, arguments.json, all_times_us=all_times)


if __name__ == "__main__":
    main()
