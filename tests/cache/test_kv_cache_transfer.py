"""Blocks swapped out, in and copied, against numpy: bit for bit in every dtype, and nothing else touched."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checking import checking
from pyagent_kv_jax import ConfigError, DType, InvalidBlockError, KVCacheConfig, KVPages, ShapeMismatchError
from pyagent_kv_jax.cache import host_pages
from pyagent_kv_jax.cache.block_views import KVCacheBlock
from pyagent_kv_jax.cache.host_pages import HostPages, swap_in, swap_out
from pyagent_kv_jax.cache.kv_cache_transfer import KVCacheTransfer
from pyagent_kv_jax.config import LayerGroup

BLOCKS, HOST_BLOCKS = 11, 9
CONFIG = KVCacheConfig(num_layers=3, num_heads=2, head_dim=16, v_head_dim=8, num_blocks=BLOCKS, block_size=4)
GROUPED = dataclasses.replace(CONFIG, layer_groups=(LayerGroup((0, 2)), LayerGroup((1,), sliding_window=8)))
GIB = 2**30


def with_bits(arrays: Any, seed: int, low: int = 0) -> Any:
    """The same arrays of random bits, NaNs of any payload among them; where they were."""
    rng = np.random.default_rng(seed)

    def bits(x: jax.Array) -> jax.Array:
        values = rng.integers(low, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)
        return jax.device_put(values, x.sharding, may_alias=False)

    return dataclasses.replace(arrays, k_pages=bits(arrays.k_pages), v_pages=bits(arrays.v_pages))


def random_pages(config: KVCacheConfig = CONFIG, seed: int = 0) -> KVPages:
    return with_bits(KVPages.create(config), seed)


def poisoned_host(config: KVCacheConfig = CONFIG, seed: int = 1) -> HostPages:
    """All bytes 255: NaN in every float."""
    return with_bits(HostPages.create(config, HOST_BLOCKS), seed, low=255)


def raw(stored: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(stored)).view(np.uint8)


def on_device(pages: KVPages) -> list[np.ndarray]:
    """Bytes of K and V, [blocks, layers, ...]."""
    layers = pages.config.layers_per_group
    return [raw(x).reshape(layers, -1, *x.shape[1:-1], raw(x).shape[-1]).swapaxes(0, 1).copy() for x in kv(pages)]


def on_host(host: HostPages) -> list[np.ndarray]:
    return [raw(x).copy() for x in kv(host)]


def kv(pages: Any) -> tuple[jax.Array, jax.Array]:
    return pages.k_pages, pages.v_pages


def check(got: list[np.ndarray], before: list[np.ndarray], source: list[np.ndarray], src: Any, dst: Any) -> None:
    """``got`` is ``before`` with blocks ``dst`` replaced by blocks ``src`` of ``source``."""
    for after, wanted, blocks in zip(got, (x.copy() for x in before), source, strict=True):
        wanted[dst] = blocks[src]
        np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_out_and_in_bit_for_bit(dtype: DType, count: int) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    rng = np.random.default_rng(count)
    pages, host = random_pages(config), poisoned_host(config)
    gpu, cpu = rng.permutation(BLOCKS)[:count], rng.permutation(HOST_BLOCKS)[:count]
    device_before, host_before = on_device(pages), on_host(host)

    host = swap_out(pages, host, gpu, cpu)
    check(on_host(host), host_before, device_before, gpu, cpu)
    check(on_device(pages), device_before, device_before, [], [])
    assert host.k_pages.sharding.memory_kind == "pinned_host"

    others, elsewhere = random_pages(config, seed=7), rng.permutation(BLOCKS)[:count]
    before = on_device(others)
    after = swap_in(host, others, cpu, elsewhere)
    check(on_device(after), before, on_host(host), cpu, elsewhere)
    check(on_device(after), before, device_before, gpu, elsewhere)
    assert after.k_pages.sharding.memory_kind != "pinned_host"
    chex.assert_trees_all_equal(after.k_scale, others.k_scale)


@pytest.mark.parametrize("eager", [True, False])
def test_k_stays_k_where_v_has_its_shape(eager: bool) -> None:
    out, into = (swap_out, swap_in) if eager else (jax.jit(swap_out), jax.jit(swap_in))
    config = dataclasses.replace(CONFIG, v_head_dim=CONFIG.head_dim)
    pages, host = random_pages(config), poisoned_host(config)
    device_before, host_before = on_device(pages), on_host(host)
    host = out(pages, host, np.array([10, 0, 4]), np.array([3, 8, 0]))
    check(on_host(host), host_before, device_before, [10, 0, 4], [3, 8, 0])
    after = into(host, pages, np.array([3, 0]), np.array([1, 2]))
    check(on_device(after), device_before, device_before, [10, 4], [1, 2])


def test_a_block_of_a_group_spans_its_layers() -> None:
    pages, host = random_pages(GROUPED), poisoned_host(GROUPED)
    assert host.k_pages.shape == (HOST_BLOCKS, 2, 2, 4, 16)
    assert host.nbytes == HOST_BLOCKS * GROUPED.block_size_bytes()
    device_before, host_before = on_device(pages), on_host(host)
    host = swap_out(pages, host, [10, 0], [3, 8])
    check(on_host(host), host_before, device_before, [10, 0], [3, 8])
    check(on_device(swap_in(host, pages, [8], [5])), device_before, device_before, [0], [5])


@pytest.mark.parametrize("count", range(1, 9))
def test_swaps_in_several_pieces(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "_LARGEST_CHUNK", 2)
    pages, host = random_pages(), poisoned_host()
    device_before, host_before = on_device(pages), on_host(host)
    gpu, cpu = np.arange(count) + 2, np.arange(count)[::-1]
    host = swap_out(pages, host, gpu, cpu)
    check(on_host(host), host_before, device_before, gpu, cpu)
    check(on_device(swap_in(host, pages, cpu, gpu - 1)), device_before, device_before, gpu, gpu - 1)


def test_few_programs() -> None:
    dispatched = host_pages._DISPATCHED[host_pages._copy_out]
    config = dataclasses.replace(CONFIG, num_blocks=1100, num_layers=1)
    pages, host = KVPages.create(config), HostPages.create(config, 1100)
    before = dispatched._cache_size()
    for count in (1, 3, 5, 77, 255, 256, 300, 1000):
        host = swap_out(pages, host, np.arange(count), np.arange(count))
    assert dispatched._cache_size() - before <= 9


@pytest.mark.parametrize("eager", [True, False])
def test_pairs_with_padding_are_left_out(eager: bool) -> None:
    out, into = (swap_out, swap_in) if eager else (jax.jit(swap_out), jax.jit(swap_in))
    pages, host = random_pages(), poisoned_host()
    device_before, host_before = on_device(pages), on_host(host)
    gpu, cpu = jnp.array([-1, 4, 2, -1, 9]), jnp.array([0, 1, -1, -1, 7])
    moved = out(pages, host, gpu, cpu)
    check(on_host(moved), host_before, device_before, [4, 9], [1, 7])
    moved = out(pages, moved, jnp.array([-1, 3]), jnp.array([2, -1]))
    check(on_host(moved), host_before, device_before, [4, 9], [1, 7])
    check(on_device(into(moved, pages, cpu, jnp.array([-1, 0, 6, -1, -1]))), device_before, device_before, [4], [0])


def test_ids_outside_the_pools_move_nothing_under_jit() -> None:
    pages, host = random_pages(), poisoned_host()
    device_before, host_before = on_device(pages), on_host(host)
    moved = jax.jit(swap_out)(pages, host, jnp.array([BLOCKS, 4, 2, -7]), jnp.array([0, HOST_BLOCKS, 5, 6]))
    check(on_host(moved), host_before, device_before, [2], [5])
    after = jax.jit(swap_in)(moved, pages, jnp.array([HOST_BLOCKS, 5, 5]), jnp.array([0, BLOCKS, 3]))
    check(on_device(after), device_before, device_before, [2], [3])
    with checking():
        checked = jax.experimental.checkify.checkify(jax.jit(swap_out))
        error, _ = checked(pages, moved, jnp.array([BLOCKS]), jnp.array([0]))
    with pytest.raises(jax.experimental.checkify.JaxRuntimeError, match="gpu_ids"):
        error.throw()


def test_order_comes_from_the_values() -> None:
    """Nothing is waited for, yet no block is overwritten before it was read, or read before it was written."""

    @jax.jit
    def overwritten(pages: KVPages) -> KVPages:
        return dataclasses.replace(pages, k_pages=pages.k_pages * 0 - 1, v_pages=pages.v_pages * 0 - 2)

    config = dataclasses.replace(CONFIG, num_blocks=64, head_dim=64, v_head_dim=64)
    transfer, pages = KVCacheTransfer(config, 64), with_bits(KVPages.create(config), 3, low=1)
    rng, wanted = np.random.default_rng(3), on_device(pages)
    for _ in range(20):
        order = rng.permutation(64)
        transfer.swap_out(pages, np.arange(64), order)
        pages = jax.jit(overwritten, donate_argnums=0)(pages)
        shuffled = rng.permutation(64)
        pages = transfer.swap_in(pages, order, shuffled)
        wanted = [blocks[np.argsort(shuffled)] for blocks in wanted]
    check(on_device(pages), wanted, wanted, [], [])


def test_two_blocks_change_places() -> None:
    pages = random_pages()
    before = on_device(pages)
    transfer = KVCacheTransfer(CONFIG, 2)
    transfer.swap_out(pages, [3, 8], [0, 1])
    pages = transfer.swap_in(pages, [0, 1], [8, 3])
    check(on_device(pages), before, before, [3, 8], [8, 3])
    pages = transfer.copy_blocks(pages, [3, 8, 5], [8, 3, 0])
    check(on_device(pages), before, before, [5], [0])


def test_ids_and_views_alike() -> None:
    pages = random_pages()
    before = on_device(pages)
    transfer = KVCacheTransfer(CONFIG, HOST_BLOCKS)
    gpu, cpu = KVCacheBlock(6), KVCacheBlock(2, on_host=True)
    transfer.swap_out(pages, gpu_block=gpu, cpu_block=2)
    transfer.swap_out(pages, np.int32(1), [KVCacheBlock(4, on_host=True)])
    after = transfer.swap_in(pages, cpu_block=(cpu, 4), gpu_block=jnp.array([0, 9]))
    check(on_device(after), before, before, [6, 1], [0, 9])
    after = transfer.copy_blocks(after, src_blocks=[gpu, 3, -1], dst_blocks=[KVCacheBlock(7), 10, 2])
    check(on_device(after), before, before, [6, 1, 6, 3], [0, 9, 7, 10])
    assert transfer.copy_blocks(after, [], []) is after


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FP8])
def test_what_changes_changes_in_place(dtype: DType) -> None:
    """Pools of 1 GiB and more that are never made; dispatched, and within a jit of the caller's."""
    config = KVCacheConfig(num_layers=4, num_heads=4, head_dim=128, num_blocks=8192, block_size=32, dtype=dtype)
    pages = jax.eval_shape(lambda: KVPages.create(config))
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")  # of a NamedSharding jax keeps the memory when it traces a shape
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind="pinned_host")
    host = HostPages(*(jax.ShapeDtypeStruct((8192, 4, *x.shape[1:]), x.dtype, sharding=sharding) for x in kv(pages)))
    size, ids = sum(x.size * x.dtype.itemsize for x in kv(pages)), jax.ShapeDtypeStruct((64,), jnp.int32)
    assert size >= GIB
    programs = [
        host_pages._DISPATCHED[host_pages._copy_out].lower(kv(pages), kv(host), ids, ids),
        host_pages._DISPATCHED[host_pages._copy_in].lower(kv(host), kv(pages), ids, ids),
        jax.jit(swap_out, donate_argnums=1).lower(pages, host, ids, ids),
        jax.jit(swap_in, donate_argnums=1).lower(host, pages, ids, ids),
    ]
    for program in programs:
        memory = program.compile().memory_analysis()
        assert size <= memory.alias_size_in_bytes + memory.host_alias_size_in_bytes < size + 2**20
        assert memory.temp_size_in_bytes + memory.host_temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (InvalidBlockError, lambda t, p: t.swap_out(p, [0, BLOCKS], [0, 1]), r"gpu_block|gpu_ids: got \[11\]"),
        (InvalidBlockError, lambda t, p: t.swap_out(p, 0, HOST_BLOCKS), "want -1 or 0 to 8"),
        (InvalidBlockError, lambda t, p: t.swap_in(p, -2, 0), r"got \[-2\]"),
        (InvalidBlockError, lambda t, p: t.swap_out(p, [0, 1, 2], [4, 5, 4]), r"got \[4\] more than once"),
        (InvalidBlockError, lambda t, p: t.swap_in(p, [0, 1], [4, 4]), "more than once"),
        (InvalidBlockError, lambda t, p: t.copy_blocks(p, [0, 1], [4, 4]), r"dst_blocks: got \[4\] more"),
        (InvalidBlockError, lambda t, p: t.copy_blocks(p, [0, 11], [4, 5]), r"src_blocks: got \[11\]"),
        (InvalidBlockError, lambda t, p: t.swap_out(p, KVCacheBlock(1, on_host=True), 0), "gpu_block: got the host's"),
        (InvalidBlockError, lambda t, p: t.swap_in(p, [KVCacheBlock(1)], 0), "want the host's"),
        (ShapeMismatchError, lambda t, p: t.swap_out(p, [0, 1], [0]), "got 1 ids, want 2"),
        (ShapeMismatchError, lambda t, p: t.copy_blocks(p, [0], [0, 1]), "got 2 ids, want 1"),
        (ShapeMismatchError, lambda t, p: t.swap_out(p, [0.5], [0]), "float64"),
        (ShapeMismatchError, lambda t, p: t.swap_out(p, [[0]], [[0]]), r"\[1, 1\]"),
        (ShapeMismatchError, lambda t, p: t.swap_out(random_pages(GROUPED), 0, 0), "want .*2, 2, 4, 16"),
        (
            ShapeMismatchError,
            lambda t, p: t.swap_in(random_pages(dataclasses.replace(CONFIG, dtype="int8")), 0, 0),
            "8",
        ),
        (ConfigError, lambda t, p: KVCacheTransfer(CONFIG, 0), "got 0"),
    ],
)
def test_bad_input_raises_and_changes_nothing(error: type[Exception], call: Any, wanted: str) -> None:
    pages, transfer = random_pages(), KVCacheTransfer(CONFIG, HOST_BLOCKS)
    transfer.swap_out(pages, [3, 4], [1, 6])
    device_before, host_before = on_device(pages), on_host(transfer.host)
    with pytest.raises(error, match=wanted):
        call(transfer, pages)
    check(on_device(pages), device_before, device_before, [], [])
    check(on_host(transfer.host), host_before, host_before, [], [])


def test_threads_swap_out_side_by_side() -> None:
    pages, transfer = random_pages(), KVCacheTransfer(CONFIG, HOST_BLOCKS)
    before = on_device(pages)

    def work(block: int) -> None:
        for offset in range(10):
            transfer.swap_out(pages, (block + offset) % BLOCKS, block)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(HOST_BLOCKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = on_host(transfer.host)
    check(after, after, before, (np.arange(HOST_BLOCKS) + 9) % BLOCKS, np.arange(HOST_BLOCKS))
