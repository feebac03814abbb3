"""Attention over a cache on a mesh equals attention over lists of tokens, however it is spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import ConfigError, DeviceUnavailableError, DType, KVCacheConfig, KVPages, PagedKVCache
from pyagent_kv_jax.cache import kv_pages
from pyagent_kv_jax.cache.kv_pages import clear_blocks_in_place, copy_blocks_in_place
from pyagent_kv_jax.distributed import AllReduceStrategy, CacheSharding, Combine, ShardedKVPages, sharded_cache
from pyagent_kv_jax.distributed import combine as combine_module
from pyagent_kv_jax.distributed import sharded_kv_pages as sharded_module
from pyagent_kv_jax.errors import ShapeMismatchError
from tests.distributed.attention_on_mesh import (
    BLOCKS,
    DIM,
    LAYERS,
    ROWS,
    STEPS,
    TOKENS,
    Contexts,
    attend_all_layers,
    config_for,
    empty_cache,
    random_step,
)
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh

MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8), "3x2": (3, 2)}


def spread(dcp: int, tp: int, **options: object) -> CacheSharding:
    return CacheSharding(cpu_mesh(dcp=dcp, tp=tp), "dcp", "tp", **options)


gather = jax.jit(lambda pages, ids: pages.gather_blocks(ids))
extend = jax.jit(lambda cache, lens: cache.extend(lens, num_tokens=TOKENS))


def check_steps(sharding: CacheSharding, q_heads: int, kv_heads: int, slots: int = 16, **options: object) -> None:
    """All kinds of steps, one after another, outputs and LSE within 1e-5."""
    rng = np.random.default_rng(q_heads + kv_heads)
    cache, contexts = empty_cache(config_for(sharding, kv_heads, slots), sharding), Contexts.empty(kv_heads)
    for lens in STEPS.values():
        step = random_step(rng, q_heads, kv_heads)
        out, lse, cache = attend_all_layers(cache, np.array(lens), *step, **options)
        want_out, want_lse = contexts.attend(lens, *step, **options)
        np.testing.assert_allclose(out, want_out, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("interleave", [1, 4, 16])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_step_equals_one_device(sizes: tuple[int, int], interleave: int, kv_heads: int) -> None:
    """Prefill, chunks of it, decode and all mixed; rows that are empty, of one token, of fewer than there are ranks."""
    combine = [Combine.ALL_TO_ALL, Combine.REDUCE_SCATTER][(interleave + kv_heads) % 2]
    check_steps(spread(*sizes, interleave=interleave, combine=combine), 24, kv_heads)


@pytest.mark.parametrize("strategy", AllReduceStrategy)
def test_every_strategy_equals_one_device(strategy: AllReduceStrategy) -> None:
    check_steps(spread(3, 2, combine=Combine.ALL_REDUCE, strategy=strategy), 8, 2)


@pytest.mark.parametrize("combine", [Combine.ALL_TO_ALL, Combine.REDUCE_SCATTER])
def test_sinks_windows_and_soft_caps(combine: Combine) -> None:
    rng = np.random.default_rng(2)
    sinks, window = jnp.asarray(rng.normal(size=8), jnp.float32), jnp.int32(7)
    check_steps(spread(4, 2, interleave=4, combine=combine), 8, 2, sinks=sinks, sliding_window=window)
    with_cap = {"options": (("logits_soft_cap", 2.0), ("scale", 0.5))}
    sharding, contexts = spread(4, 2, combine=combine), Contexts.empty(2)
    step = random_step(rng, 8, 2)
    out, _, _ = attend_all_layers(
        empty_cache(config_for(sharding, 2), sharding), np.array(STEPS["prefill"]), *step, **with_cap
    )
    want, _ = contexts.attend(STEPS["prefill"], *step, logits_soft_cap=2.0, scale=0.5)
    np.testing.assert_allclose(out, want, atol=1e-5, rtol=1e-5)


def test_decode_layout_compiles_once() -> None:
    """One query a row; a row that takes no part between others; lengths grow, shapes do not."""
    chex.clear_trace_counter()
    sharding, rng = spread(4, 2), np.random.default_rng(0)
    cache, contexts = empty_cache(config_for(sharding, 2), sharding), Contexts.empty(2)
    step_once = jax.jit(chex.assert_max_traces(attend_all_layers.__wrapped__, n=1), donate_argnums=0, static_argnums=5)
    for _ in range(6):
        q, k, v = (x[:, :ROWS] for x in random_step(rng, 8, 2))
        out, lse, cache = step_once(cache, np.ones(ROWS, np.int32), q, k, v, None)
        want_out, want_lse = contexts.attend([1] * ROWS, q, k, v)
        chex.assert_trees_all_close((out, lse), (want_out, want_lse), atol=1e-5, rtol=1e-5)


def test_bfloat16_states_travel_whole() -> None:
    """Outputs and LSEs cross as words of 16 bits: both forms agree with one device, to bfloat16."""
    rng, results = np.random.default_rng(1), []
    step = [jnp.asarray(x, jnp.bfloat16) for x in random_step(rng, 8, 2)]
    for combine in (Combine.ALL_TO_ALL, Combine.REDUCE_SCATTER):
        sharding = spread(4, 2, combine=combine)
        cache = empty_cache(config_for(sharding, 2), sharding)
        results.append(attend_all_layers(cache, np.array(STEPS["prefill"]), *step)[:2])
    want = Contexts.empty(2).attend(STEPS["prefill"], *(np.asarray(x, np.float32) for x in step))
    for out, lse in results:
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), want[0], atol=0.02, rtol=0.02)
        np.testing.assert_allclose(lse, want[1], atol=1e-5, rtol=1e-5)


def test_quantised_pages_of_kernel_blocks_equal_those_of_one_device() -> None:
    """int8 with scales by head, three pages to a block: bit for bit what one device stores, read alike."""
    sharding, rng = spread(2, 4, interleave=2), np.random.default_rng(3)
    config = config_for(sharding, 2, slots=12, kernel_block_size=8, dtype=DType.INT8)
    scales = [rng.uniform(0.01, 0.03, (LAYERS, 2)) for _ in range(2)]
    caches = [
        PagedKVCache.create(config, pages.with_scales(*scales))
        for pages in (ShardedKVPages.create(config, sharding), KVPages.create(config))
    ]
    q, k, v = random_step(rng, 8, 2)
    outs, blocks = [], []
    for cache in caches:
        _, meta = extend(cache, np.array(STEPS["prefill"]))
        out, pages = jax.jit(type(cache.pages).attend, static_argnums=1)(cache.pages, 1, q[1], k[1], v[1], meta)
        outs.append(out)
        blocks.append([np.asarray(x) for x in gather(pages, jnp.arange(4))])
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    order = sharding.token_order(config.block_size)
    for spread_out, whole in zip(*blocks, strict=True):
        chex.assert_shape(spread_out, (LAYERS, 4, 4, config.block_size, DIM))  # 2 heads, each on two tensor ranks
        np.testing.assert_array_equal(spread_out, np.repeat(whole, 2, axis=2)[:, :, :, order])


def test_blocks_are_copied_and_cleared() -> None:
    sharding, rng = spread(4, 2), np.random.default_rng(4)
    pages = ShardedKVPages.create(config_for(sharding, 2), sharding)
    slots = jnp.asarray(rng.permutation(3 * 64)[:TOKENS], jnp.int32)
    _, k, v = random_step(rng, 8, 2)
    pages = jax.jit(ShardedKVPages.write)(pages, 1, k[1], v[1], slots)
    before = [np.asarray(x) for x in gather(pages, jnp.arange(3))]
    assert all(np.abs(x).sum() > 0 for x in before)
    pages = copy_blocks_in_place(pages, jnp.array([0, 1, -1]), jnp.array([1, 5, 2]))
    pages = clear_blocks_in_place(pages, jnp.array([2, -1]))
    for x, was in zip(gather(pages, jnp.array([0, 1, 5, 2, -1])), before, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, :3], was[:, [0, 0, 1]])
        assert not np.asarray(x)[:, 3:].any()


# -- mistakes that must show -------------------------------------------------------------------------------------------


@pytest.fixture
def mistaken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For mistakes put in on purpose: nothing compiled before or after is reused."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


def must_fail(sharding: CacheSharding, **options: object) -> None:
    with pytest.raises(AssertionError, match=r"Mismatched elements|location mismatch"):
        check_steps(sharding, 8, 2, **options)


def test_a_merge_in_base_2_shows(mistaken: pytest.MonkeyPatch) -> None:
    class Base2:
        exp, log = staticmethod(jnp.exp2), staticmethod(jnp.log2)
        __getattr__ = staticmethod(lambda name: getattr(jnp, name))

    mistaken.setattr(combine_module, "jnp", Base2())
    must_fail(spread(4, 2, combine=Combine.REDUCE_SCATTER))


def test_a_global_length_for_a_local_one_shows(mistaken: pytest.MonkeyPatch) -> None:
    attention = kv_pages.paged_attention
    mistaken.setattr(kv_pages, "paged_attention", lambda *args, context_parallel, **kw: attention(*args, **kw))
    must_fail(spread(4, 2))


def test_an_interleave_off_by_one_shows(mistaken: pytest.MonkeyPatch) -> None:
    share = sharded_module._share
    mistaken.setattr(sharded_module, "_share", lambda sharding: share(sharding)._replace(interleave=5))
    must_fail(spread(4, 2, interleave=4))


def test_sinks_on_every_rank_show(mistaken: pytest.MonkeyPatch) -> None:
    mistaken.setattr(sharded_module, "sinks_of_rank", lambda sinks, rank: sinks)
    must_fail(spread(4, 2), sinks=jnp.arange(8.0))


# -- what is compiled --------------------------------------------------------------------------------------------------


def compiled(
    sharding: CacheSharding, q_heads: int, kv_heads: int, tokens: int, blocks: int = BLOCKS
) -> jax.stages.Compiled:
    """One layer's attention, q spread as it is wanted."""
    config = config_for(sharding, kv_heads, num_blocks=blocks)
    pages = jax.eval_shape(lambda: ShardedKVPages.create(config, sharding))
    place = sharding.named(sharding.page_spec())
    pages = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), pages)
    meta = jax.eval_shape(
        lambda: PagedKVCache.create(config, pages=0).extend(jnp.ones(ROWS, jnp.int32), num_tokens=tokens)[1]
    )
    heads = jax.sharding.PartitionSpec(None, sharding.q_head_axes(q_heads))
    q, k = (
        jax.ShapeDtypeStruct((tokens, count, DIM), jnp.float32, sharding=sharding.named(spec))
        for count, spec in ((q_heads, heads), (kv_heads, jax.sharding.PartitionSpec(None, None)))
    )
    attend = jax.jit(ShardedKVPages.attend, donate_argnums=0)
    return attend.lower(pages, jax.ShapeDtypeStruct((), jnp.int32), q, k, k, meta).compile()


def test_nothing_but_queries_and_states_travels() -> None:
    """The collectives of each form, and their bytes on one device by hand; 4 x 2 ranks, 64 tokens, 16 query heads."""
    heads, words = TOKENS * 16 // 2, 4  # (token, query head) pairs of a tensor rank; bytes of a float32
    gathered_q = ("all-gather", heads * DIM * words)
    assert collectives(compiled(spread(4, 2, combine="all_to_all"), 16, 2, TOKENS)) == [
        gathered_q,
        ("all-to-all", heads * (DIM + 1) * words),
    ]
    assert collectives(compiled(spread(4, 2, combine="reduce_scatter"), 16, 2, TOKENS)) == sorted(
        [gathered_q, ("all-gather", 4 * heads * words), ("reduce-scatter", heads // 4 * DIM * words)]
    )
    assert collectives(compiled(spread(1, 8), 16, 8, TOKENS)) == []
    reduced = collectives(compiled(spread(4, 2, combine="all_reduce"), 16, 2, TOKENS))
    assert {name for name, _ in reduced} == {"all-reduce"}


def test_pages_are_written_in_place() -> None:
    """A device's memory for temporaries does not grow with its pages, all of which are donated."""
    temporary = {}
    for blocks in (100, 1000):
        memory = compiled(spread(4, 2), 16, 2, TOKENS, blocks).memory_analysis()
        pages = 2 * LAYERS * blocks * 16 * DIM * 4  # of one head on one device
        assert memory.alias_size_in_bytes >= pages
        temporary[blocks] = memory.temp_size_in_bytes
    assert temporary[1000] - temporary[100] < 0.01 * pages


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": cpu_mesh(dcp=4).abstract_mesh}, "mesh: got AbstractMesh.*want a jax.sharding.Mesh of devices"),
        ({"context_axis": "ctx"}, r"context_axis: got 'ctx', want one of the mesh's axes \('dcp', 'tp'\)"),
        ({"tensor_axis": "dcp"}, "got 'dcp' twice"),
        ({"interleave": 0}, "interleave: got 0"),
        ({"interleave": 1.0}, "interleave: got 1.0"),
        ({"combine": "gather"}, "combine: got 'gather'"),
        ({"strategy": "star"}, "strategy: got 'star'"),
    ],
    ids=str,
)
def test_shardings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheSharding(**{"mesh": cpu_mesh(dcp=4, tp=2), "context_axis": "dcp", "tensor_axis": "tp", **options})


def test_what_does_not_divide_is_refused_before_anything_is_made() -> None:
    sharding = spread(4, 2)
    sizes = {"num_layers": 1, "num_heads": 3, "head_dim": 8, "num_blocks": 4, "block_size": 16}
    with pytest.raises(ConfigError, match="num_heads: got 3 KV heads over 2 ranks of 'tp'"):
        ShardedKVPages.create(KVCacheConfig(**sizes), sharding)
    with pytest.raises(ConfigError, match="interleave: got 1, with pages of 10 tokens over 4 ranks"):
        ShardedKVPages.create(KVCacheConfig(**{**sizes, "num_heads": 2, "block_size": 10}), sharding)
    with pytest.raises(ConfigError, match="interleave: got 8"):
        ShardedKVPages.create(KVCacheConfig(**{**sizes, "num_heads": 2}), dataclasses.replace(sharding, interleave=8))
    with pytest.raises(DeviceUnavailableError, match="mesh: got 'cpu' devices, want 'tpu'"):
        ShardedKVPages.create(KVCacheConfig(**{**sizes, "num_heads": 2, "device": "tpu"}), sharding)
    with pytest.raises(ConfigError, match=r"distributed\.ShardedKVPages"):
        KVPages.create(KVCacheConfig(**{**sizes, "num_heads": 2}), sharding.named(sharding.page_spec()))


def test_arrays_that_do_not_fit_are_refused() -> None:
    sharding = spread(4, 2, combine="all_to_all")
    cache = sharded_cache(config_for(sharding, 2), sharding)
    _, meta = extend(cache, np.ones(ROWS, np.int32))
    q, k = np.zeros((ROWS, 8, DIM), np.float32), np.zeros((ROWS, 2, DIM), np.float32)
    for arguments, error, message in [
        ((q[:, :6], k, k), ConfigError, "q heads: got 6, want a multiple of 8"),
        ((q, k[:, :1], k), ShapeMismatchError, r"k: got shape \[6, 1, 8\], want \[tokens, 2, 8\]"),
        ((q, k, k[..., :4]), ShapeMismatchError, r"v: got shape \[6, 2, 4\]"),
        ((q[..., :4], k, k), ShapeMismatchError, "q: got shape"),
    ]:
        with pytest.raises(error, match=message):
            jax.eval_shape(cache.attend, 0, *arguments, meta)
