"""Greedy answers that are under way while the block size changes are those of a model without any cache."""

from __future__ import annotations

import jax
import numpy as np
from serving_models import CONFIG, small_model

from pyagent_kv_jax import KVCacheManager
from pyagent_kv_jax.serving import Engine, EngineConfig, SamplingParams, serve
from tests.models.prompt_attention import PromptAttention, prompt_metadata


def test_answers_do_not_depend_on_the_block_size():
    model, rng = small_model(), np.random.default_rng(7)
    shared = rng.integers(0, CONFIG.vocab_size - 1, 21).tolist()
    prompts = [shared, [*shared, 5, 6], *(rng.integers(0, CONFIG.vocab_size - 1, 9).tolist() for _ in range(3))]
    sizes = {"num_blocks": 16, "block_size": 16, "kernel_block_size": 4, "max_num_reqs": 4, "max_model_len": 64}
    manager = KVCacheManager(CONFIG.kv_cache_config(**sizes))
    config = EngineConfig(3, 64, row_buckets=(3,), token_buckets=(64,), tables_on_device=True)
    engine = Engine(model, manager, config)  # two of the prompts come after the change
    manager.allocate("in the way", 3)  # so that nobody's blocks stand where larger ones begin
    tokens, copied = [], []

    def change_after_prefill(index: int, token: int) -> None:
        tokens.append(token)
        if len(tokens) == 3:
            copied.append(manager.change_block_size(24).num_copied)  # blocks are split and merged

    params = SamplingParams(max_tokens=16, ignore_eos=True)
    results = serve(engine, prompts, params, on_token=change_after_prefill)
    assert len(copied) == 1
    assert copied[0] > 0
    assert (engine.scheduler.config.block_size, engine.scheduler.config.num_blocks) == (24, 10)

    texts = [[*prompt, *result.token_ids] for prompt, result in zip(prompts, results, strict=True)]
    meta = prompt_metadata([len(text) for text in texts], 160)
    padded = np.zeros(160, np.int32)
    padded[: meta.query_start_loc[-1]] = np.concatenate(texts)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens, PromptAttention(), meta)[0])(padded))
    top = np.sort(logits, axis=-1)
    for start, prompt, result in zip(meta.query_start_loc, prompts, results, strict=False):
        at = start + len(prompt) - 1 + np.arange(16)
        assert (top[at, -1] - top[at, -2]).min() > 1e-4  # no ties, so the choice is clear
        assert logits[at].argmax(axis=-1).tolist() == list(result.token_ids)
