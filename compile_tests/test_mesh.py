"""Attention over a cache on a mesh, compiled for four H100s and a TPU v5e 2x2: what travels, and that no page does."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from compile_tests import nvidia, tpu
from pallas_kernels.paged_attention.shapes import SHAPES
from pyagent_kv_jax import AttentionMetadata, DType, KVCacheConfig
from pyagent_kv_jax.cache.kv_pages import page_shapes
from pyagent_kv_jax.distributed import CacheSharding, Combine, ShardedKVPages
from tests.distributed.hlo import collectives

LAYERS, BLOCKS, ROWS, WIDTH = 4, 2048, 16, 128
LLAMA = SHAPES["Llama-3-8B"]
PLATFORMS = {"sm_90": "cuda", "v5e": "tpu"}


def mesh_of(target: str, dcp: int, tp: int) -> Mesh:
    if target == "v5e":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu.TPUS[target]).devices
    else:
        text = (nvidia.TARGETS / nvidia.GPUS[target].file).read_text()
        devices = topologies.get_topology_desc("h100s", platform="cuda", target_config=text, topology="1x1x4").devices
    return Mesh(np.array(devices).reshape(dcp, tp), ("dcp", "tp"), axis_types=(AxisType.Auto,) * 2)


def compiled(target: str, dcp: int, tp: int, tokens: int | None, **options: Any) -> Any:
    """All layers' attention in a scan, the pages carried; ``tokens`` None: a decode step of a token a row."""
    sharding = CacheSharding(mesh_of(target, dcp, tp), "dcp", "tp", **options)
    config = KVCacheConfig(
        num_layers=LAYERS,
        num_heads=LLAMA.kv_heads,
        head_dim=LLAMA.head_dim,
        num_blocks=BLOCKS,
        block_size=16 * dcp,
        dtype=DType.BFLOAT16,
        device=PLATFORMS[target],
    )
    place = sharding.named(sharding.page_spec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in page_shapes(config)]
    pages = ShardedKVPages(arrays[0], arrays[1], None, None, config, sharding)
    count = ROWS if tokens is None else tokens

    def everywhere(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.replicated)

    meta = AttentionMetadata(
        block_tables=everywhere(ROWS, WIDTH),
        kv_lens=everywhere(ROWS),
        query_start_loc=None if tokens is None else everywhere(ROWS + 1),
        slot_mapping=everywhere(count),
        positions=everywhere(count),
        ok=jax.ShapeDtypeStruct((ROWS,), jnp.bool_, sharding=sharding.replicated),
        max_query_len=1 if tokens is None else tokens,
        max_kv_len=WIDTH * config.block_size,
    )

    def tokens_of(heads: int, spec: Any) -> jax.ShapeDtypeStruct:
        shape = (LAYERS, count, heads, LLAMA.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named(P(None, None, *spec)))

    q = tokens_of(LLAMA.q_heads, (sharding.q_head_axes(LLAMA.q_heads) or None,))
    k = tokens_of(LLAMA.kv_heads, ("tp",))

    @partial(jax.jit, donate_argnums=0)
    def attend(pages: Any, q: Any, k: Any, v: Any, meta: Any) -> Any:
        def layer(pages: Any, inputs: Any) -> Any:
            out, pages = pages.attend(inputs[0], *inputs[1:], meta)
            return pages, out

        return jax.lax.scan(layer, pages, (jnp.arange(LAYERS), q, k, v))

    lowered = attend.trace(pages, q, k, k, meta).lower(lowering_platforms=(PLATFORMS[target],))
    return lowered.compile()


@pytest.mark.parametrize("tokens", [None, 256], ids=["decode", "prefill"])
@pytest.mark.parametrize("combine", [Combine.ALL_TO_ALL, Combine.REDUCE_SCATTER])
@pytest.mark.parametrize("sizes", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("target", PLATFORMS)
def test_queries_and_states_travel_and_pages_do_not(
    target: str, sizes: tuple[int, int], combine: Combine, tokens: int | None
) -> None:
    dcp, tp = sizes
    program = compiled(target, dcp, tp, tokens, combine=combine)
    heads, dim = (tokens or ROWS) * LLAMA.q_heads // tp, LLAMA.head_dim  # (token, query head) pairs of a tensor rank
    want = [("all-gather", heads * dim * 2)]  # bfloat16 queries
    if combine is Combine.ALL_TO_ALL:
        want += [("all-to-all", heads * (dim + 2) * 2)]  # outputs, and LSEs as two words each
    else:
        want += [("all-gather", dcp * heads * 4), ("reduce-scatter", heads // dcp * dim * 4)]
    found = collectives(program)
    assert sorted(set(found)) == sorted(want)
    assert len(found) in (len(want), 2 * len(want))  # for GPUs XLA may put two turns of the loop into one
    memory = program.memory_analysis()
    pages = 2 * LAYERS * BLOCKS * 16 * (LLAMA.kv_heads // tp) * dim * 2
    assert memory.alias_size_in_bytes == pages
    assert memory.temp_size_in_bytes < 2**24 < pages / 10


def test_nothing_travels_over_a_tensor_axis() -> None:
    assert collectives(compiled("sm_90", 1, 4, None)) == []
