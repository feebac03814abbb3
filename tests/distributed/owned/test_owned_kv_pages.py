"""Attention over blocks that lie on several devices, against one float64 cache that knows nothing of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.config import KVCacheConfig, LayerGroup
from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy
from pyagent_kv_jax.distributed.owned import owned_kv_pages
from pyagent_kv_jax.distributed.owned.distributed_block_table import DistributedBlockTable
from pyagent_kv_jax.distributed.owned.owned_kv_pages import OwnedKVPages
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, ShapeMismatchError
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh

ROWS, TOKENS, LAYERS, Q_HEADS, WINDOW = 4, 14, 2, 4, 7


def config_of(num_blocks: int, **options: Any) -> KVCacheConfig:
    sizes = {"num_layers": LAYERS, "num_heads": 2, "head_dim": 8, "v_head_dim": 4, "block_size": 4}
    limits = {"max_num_reqs": ROWS, "max_model_len": 32}
    return KVCacheConfig(**(sizes | limits | options), num_blocks=num_blocks, dtype="float32", device="cpu")


class Reference:
    """Every token of every row and layer, in float64."""

    def __init__(self) -> None:
        self.k: list[list[list[np.ndarray]]] = [[[] for _ in range(ROWS)] for _ in range(LAYERS)]
        self.v: list[list[list[np.ndarray]]] = [[[] for _ in range(ROWS)] for _ in range(LAYERS)]

    def attend(self, layer: int, row: int, q: Any, k: Any, v: Any, sinks: Any, window: int) -> tuple[Any, Any]:
        """One token: q [q_heads, d], k and v [heads, d]. Returns out and LSE, with the sinks in them."""
        keys, values = self.k[layer][row], self.v[layer][row]
        keys.append(k.astype(np.float64))
        values.append(v.astype(np.float64))
        group = len(q) // len(k)
        out, lse = np.zeros((len(q), v.shape[1])), np.zeros(len(q))
        for head in range(len(q)):
            logits = np.array([key[head // group] @ q[head].astype(np.float64) for key in keys[-window:]]) / np.sqrt(8)
            weights = np.exp(logits)
            lse[head] = np.log(weights.sum() + np.exp(np.float64(sinks[head])))
            out[head] = sum(w * x[head // group] for w, x in zip(weights, values[-window:], strict=True))
            out[head] /= np.exp(lse[head])
        return out, lse


@pytest.mark.parametrize(
    ("shape", "strategies"),
    [
        ({"own": 2}, ["ring", "recursive"]),
        ({"tp": 2, "own": 3}, list(AllReduceStrategy)),
        ({"own": 8}, ["nccl", "tree"]),
    ],
    ids=str,
)
def test_spilled_blocks_are_attended_where_they_are(shape: dict[str, int], strategies: list[str]) -> None:
    size, tensor_axis = shape["own"], "tp" if "tp" in shape else None
    mesh, rng = cpu_mesh(**shape), np.random.default_rng(size)
    config = config_of({2: 16, 3: 15, 8: 16}[size])
    table = DistributedBlockTable.create(
        config.table_config(), size, num_blocks=config.pool_blocks, mesh=mesh, axis="own"
    )
    pages = OwnedKVPages.create(config, mesh, "own", tensor_axis)
    pages = jax.tree.map(lambda x: x * np.nan, pages)  # nothing may be read before it is written
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(table: Any, pages: Any, lens: Any, devices: Any, q: Any, k: Any, v: Any, sinks: Any, window: Any) -> Any:
        table, meta = table.extend(lens, num_tokens=TOKENS, devices=devices)
        results = []
        for turn, strategy in enumerate(strategies):  # several for a layer write the same
            layer = turn % LAYERS
            out, lse, pages = pages.attend_with_lse(
                layer, q[layer], k[layer], v[layer], meta, sinks=sinks, strategy=strategy, sliding_window=window
            )
            results.append((out, lse))
        return table, pages, meta, results

    reference, sinks = Reference(), rng.normal(size=Q_HEADS).astype(np.float32)
    for lens in ([9, 0, 5, 0], [1, 4, 1, 0], [6, 1, 6, 1], [1, 1, 1, 1], [0, 8, 1, 5]):
        q, k, v = (
            rng.normal(size=(LAYERS, TOKENS, heads, dim)).astype(np.float32)
            for heads, dim in ((Q_HEADS, 8), (config.num_heads, 8), (config.num_heads, 4))
        )
        homes, window = rng.integers(0, 2, ROWS).astype(np.int32), np.int32(32 if lens[0] else WINDOW)
        table, pages, meta, results = step(table, pages, np.array(lens, np.int32), homes, q, k, v, sinks, window)
        assert meta.ok.all()
        rows = np.repeat(np.arange(ROWS), lens)
        for layer in range(LAYERS):
            pairs = [
                reference.attend(layer, row, q[layer, t], k[layer, t], v[layer, t], sinks, int(window))
                for t, row in enumerate(rows)
            ]
            want = tuple(np.stack(part) for part in zip(*pairs, strict=True))
            for out, lse in results[layer::LAYERS]:
                np.testing.assert_allclose(np.asarray(out)[: len(rows)], want[0], rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(np.asarray(lse)[: len(rows)], want[1], rtol=1e-5, atol=1e-5)
                assert not np.asarray(out)[len(rows) :].any()
    owners = [set(table.get_block_location(row[row >= 0]).tolist()) for row in np.asarray(table.table.blocks)]
    assert max(map(len, owners)) > 1  # some row did spill
    table.check_invariants()


def attend(table: Any, pages: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    table, meta = table.extend(np.ones(ROWS, np.int32))
    return table, *pages.attend(0, q, k, v, meta, **options)


def compiled(config: KVCacheConfig, mesh: Mesh, **options: Any) -> jax.stages.Compiled:
    table = DistributedBlockTable.create(config.table_config(), 4, num_blocks=config.pool_blocks, mesh=mesh, axis="own")
    pages = OwnedKVPages.create(config, mesh, "own")
    q, k, v = (np.ones((ROWS, heads, dim), np.float32) for heads, dim in ((Q_HEADS, 8), (2, 8), (2, 4)))
    step = jax.jit(lambda *arguments: attend(*arguments, **options), donate_argnums=(0, 1))
    return step.lower(table, pages, q, k, v).compile()


def test_pages_stay_in_place_and_on_their_device() -> None:
    """One step: the ids and free counts of the table, two all-reduces of the partials, no copy of the pages."""
    config = config_of(4 * 2048)
    program = compiled(config, cpu_mesh(own=4))
    memory, own = program.memory_analysis(), 2048 * LAYERS * 2 * 4 * (8 + 4) * 4
    assert memory.alias_size_in_bytes >= own
    assert memory.temp_size_in_bytes < own // 20
    states = ROWS * Q_HEADS * 4
    free_counts, ids, maxima, sums = 4 * 4, ROWS * 4, states, states * (4 + 1)
    want = [("all-gather", free_counts), ("all-reduce", ids), ("all-reduce", maxima), ("all-reduce", sums)]
    assert collectives(program) == sorted(want)


def test_sinks_counted_on_every_device_turn_the_comparison_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """With that mistake two devices make of a sink s the sink s + log 2.

    On shapes of its own, so that no program without the mistake could be taken for this one.
    """
    monkeypatch.setattr(owned_kv_pages, "sinks_of_rank", lambda sinks, rank: sinks)
    mesh, rng, config = cpu_mesh(own=2), np.random.default_rng(0), config_of(12, num_layers=1)
    first = np.array([0, 7, 2, 8], np.int32)  # of device 0, 1, 0, 1: the block of each row's only token
    rows = {"block_tables": first[:, None], "slot_mapping": first * config.block_size}
    ones, zeros = np.ones(ROWS, np.int32), np.zeros(ROWS, np.int32)
    meta = AttentionMetadata(
        **rows, kv_lens=ones, query_start_loc=None, positions=zeros, ok=ones > 0, max_query_len=1, max_kv_len=4
    )
    q, k, v = (rng.normal(size=(ROWS, heads, dim)).astype(np.float32) for heads, dim in ((4, 8), (2, 8), (2, 4)))
    sinks = rng.normal(size=4).astype(np.float32)
    pages = OwnedKVPages.create(config, mesh, "own")
    out, _ = jax.jit(lambda pages, sinks, *arrays: pages.attend(0, *arrays, sinks=sinks))(pages, sinks, q, k, v, meta)
    once, twice = (
        np.stack([Reference().attend(0, row, q[row], k[row], v[row], sinks + more, 32)[0] for row in range(ROWS)])
        for more in (0, np.log(2))
    )
    np.testing.assert_allclose(out, twice, rtol=1e-5, atol=1e-5)
    for row in range(ROWS):
        assert not np.allclose(out[row], once[row], rtol=1e-5, atol=1e-5)


def test_quantised_pages_and_plain_writes() -> None:
    mesh = cpu_mesh(own=2)
    pages = OwnedKVPages.create(
        KVCacheConfig(1, 2, 8, num_blocks=4, block_size=4, dtype="int8", device="cpu"), mesh, "own", None
    )
    k = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32) * 40
    written = jax.jit(lambda pages, *tokens: pages.write(0, *tokens))(pages, k, k, np.array([1, 9, -1], np.int32))
    stored = np.asarray(written.k_pages)
    chex.assert_trees_all_close(stored[0, :, 1].astype(np.float32), np.rint(k[0]), atol=1)
    chex.assert_trees_all_close(stored[2, :, 1].astype(np.float32), np.rint(k[1]), atol=1)
    assert np.count_nonzero(stored.any(axis=(1, 3))) == 2
    assert written.nbytes == 2 * 4 * 2 * 4 * 8


def test_what_does_not_fit_is_refused() -> None:
    mesh = cpu_mesh(own=2, tp=3)
    with pytest.raises(ConfigError, match=r"axis, tensor_axis: got 'rows', None, want two of \('own', 'tp'\)"):
        OwnedKVPages.create(config_of(8), mesh, "rows")
    with pytest.raises(ConfigError, match="axis, tensor_axis: got 'own', 'own'"):
        OwnedKVPages.create(config_of(8), mesh, "own", "own")
    with pytest.raises(ConfigError, match="num_blocks: got 9 over 2 devices, want a multiple of 2"):
        OwnedKVPages.create(config_of(9), mesh, "own")
    with pytest.raises(ConfigError, match="num_heads: got 2 over 3 devices, want a multiple of 3"):
        OwnedKVPages.create(config_of(8), mesh, "own", "tp")
    with pytest.raises(
        ConfigError, match="config: got num_kernel_blocks None, 2 layer groups, want None and one group"
    ):
        OwnedKVPages.create(config_of(8, layer_groups=(LayerGroup((0,)), LayerGroup((1,), 4))), mesh, "own")
    pages = OwnedKVPages.create(config_of(8), mesh, "own")
    table = DistributedBlockTable.create(config_of(8).table_config(), 2, num_blocks=8, mesh=mesh, axis="own")
    q, k, v = (np.ones((ROWS, heads, dim), np.float32) for heads, dim in ((4, 8), (2, 8), (2, 4)))
    with pytest.raises(ShapeMismatchError, match=r"k: got shape \[4, 4, 8\], want \[tokens, 2, 8\]"):
        jax.eval_shape(attend, table, pages, q, q, v)
    with pytest.raises(
        ShapeMismatchError, match=r"q: got shape \[4, 3, 8\], want \[tokens, a multiple of 2 heads, 8\]"
    ):
        jax.eval_shape(attend, table, pages, q[:, :3], k, v)
    with pytest.raises(InvalidArgumentError, match="strategy: got 'star'"):
        jax.eval_shape(partial(attend, strategy="star"), table, pages, q, k, v)
