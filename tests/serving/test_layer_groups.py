"""Generation over a cache of several layer groups: the same tokens, in fewer blocks."""

from __future__ import annotations

import numpy as np
from flax import nnx

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM
from pyagent_kv_jax.serving import SamplingParams, generate
from tests.serving.serving_models import enlarged

WINDOW = 12
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    layer_windows=(WINDOW, None, WINDOW),
)


def test_tokens_are_those_of_one_group_and_blocks_left_of_the_window_come_back() -> None:
    model = enlarged(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(3)))  # so that the greedy answer wanders
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, size).tolist() for size in (5, 40, 71, 23)]
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    results, held = {}, {}
    for grouped in (False, True):
        sizes = {"num_blocks": 96, "block_size": 4, "max_num_reqs": 4}
        manager = KVCacheManager(CONFIG.kv_cache_config(group_layers=grouped, **sizes))
        most = []
        results[grouped] = generate(
            model,
            prompts,
            sampling=sampling,
            backend=manager,
            max_num_seqs=4,
            token_budget=32,
            on_token=lambda *_, manager=manager, most=most: most.append(96 - manager.get_num_free_blocks()),
        )
        manager.check_invariants()
        assert manager.get_num_free_blocks() == 96
        held[grouped] = max(most) * manager.config.block_size_bytes()
    assert all(len(set(r.token_ids)) > 5 for r in results[True])
    assert [r.token_ids for r in results[True]] == [r.token_ids for r in results[False]]
    assert len(model.config.kv_cache_config(group_layers=True, num_blocks=96).groups) > 1
    assert held[True] < 0.7 * held[False]
