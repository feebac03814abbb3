"""Attention over a cache on a mesh equals attention over lists of tokens, however it is spread."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_kv_jax.distributed import CacheSharding, Combine
from tests.distributed.attention_on_mesh import STEPS, Contexts, attend_all_layers, config_for, empty_cache, random_step
from tests.distributed.meshes import cpu_mesh

MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8), "3x2": (3, 2)}


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
    combine = [Combine.ALL_TO_ALL, Combine.REDUCE_SCATTER][(interleave + kv_heads) % 2]
    sharding = CacheSharding(cpu_mesh(dcp=sizes[0], tp=sizes[1]), "dcp", "tp", interleave, combine)
    check_steps(sharding, 24, kv_heads)
