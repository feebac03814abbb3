"""The dense cache against numpy float64, and its manager's promises."""

import chex
import jax
import numpy as np
import pytest

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLongError,
    UnknownRequestError,
)
from pyagent_kv_jax.manager.step_plan import AdmissionPreview
from pyagent_kv_jax.serving.dense_baseline import DenseCacheManager

LAYERS, ROWS, KV_HEADS, Q_HEADS, MAX_LEN, DIM = 2, 4, 2, 6, 24, 8


def manager(rows=ROWS):
    return DenseCacheManager.like(
        KVCacheConfig(num_layers=LAYERS, num_heads=KV_HEADS, head_dim=DIM, num_blocks=1, max_model_len=MAX_LEN), rows
    )


def numpy_attention(q, keys, values, position, *, window=None, chunk=None, soft_cap=None, sinks=None):
    """One query at ``position`` over the keys up to it."""
    out = np.zeros((Q_HEADS, DIM))
    for head in range(Q_HEADS):
        kv_head = head // (Q_HEADS // KV_HEADS)
        first = 0 if window is None else max(0, position - window + 1)
        first = first if chunk is None else position // chunk * chunk
        scores = keys[first : position + 1, kv_head] @ q[head] * DIM**-0.5
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
        out[head] = weights @ values[first : position + 1, kv_head] / total
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 3}, {"chunk_size": 4}, {"logits_soft_cap": 0.7}, {"sinks": np.linspace(-1, 2, Q_HEADS)}],
    ids=str,
)
def test_prefill_mixed_and_decode_steps_match_numpy(options):
    rng = np.random.default_rng(0)
    cache_manager = manager()
    # What stands in the rows before must not matter.
    cache_manager.pages = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), cache_manager.pages)
    said = {}
    attend = jax.jit(lambda pages, layer, q, k, v, meta: pages.attend(layer, q, k, v, meta, **options))
    numpy_names = {"sliding_window": "window", "chunk_size": "chunk", "logits_soft_cap": "soft_cap", "sinks": "sinks"}
    numpy_options = {numpy_names[name]: value for name, value in options.items()}
    steps = [
        (["a", "b"], [5, 3], (), 12),
        (["b", "a", "c"], [1, 6, 2], (), 12),  # rows in another order, one decoding beside two prefills
        (["c", "b"], [1, 1], ("a",), None),
        (["b", "d", "c"], [1, 1, 1], (), None),
    ]
    for ids, counts, free, num_tokens in steps:
        plan = cache_manager.step(ids, counts, free=free, num_rows=4, num_tokens=num_tokens)
        assert plan.ok.all()
        total = num_tokens or 4
        for layer in range(LAYERS):
            q = rng.normal(size=(total, Q_HEADS, DIM)).astype(np.float32)
            k, v = rng.normal(size=(2, total, KV_HEADS, DIM)).astype(np.float32)
            before = jax.tree.map(np.array, cache_manager.pages)
            out, cache_manager.pages = attend(cache_manager.pages, np.int32(layer), q, k, v, plan.metadata)
            slots = plan.metadata.slot_mapping[plan.metadata.slot_mapping >= 0]
            for old, new, said_now in ((before.k, cache_manager.pages.k, k), (before.v, cache_manager.pages.v, v)):
                old[layer, slots // MAX_LEN, :, slots % MAX_LEN] = said_now[: len(slots)]
                chex.assert_trees_all_equal(np.asarray(new), old)  # and nothing else was written
            at = 0
            for request_id, count in zip(ids, counts, strict=True):
                keys, values = said.setdefault((request_id, layer), ([], []))
                for i in range(at, at + count):
                    keys.append(k[i])
                    values.append(v[i])
                    want = numpy_attention(
                        q[i].astype(np.float64), np.array(keys), np.array(values), len(keys) - 1, **numpy_options
                    )
                    np.testing.assert_allclose(np.asarray(out[i]), want, atol=2e-5)
                at += count
            chex.assert_trees_all_equal(np.asarray(out[at:]), np.zeros((total - at, Q_HEADS, DIM), np.float32))


def test_rows_are_updated_in_place():
    cache_manager = manager(rows=64)
    plan = cache_manager.step(["a"], [3], num_rows=4, num_tokens=8)
    q, k = np.zeros((8, Q_HEADS, DIM), np.float32), np.zeros((8, KV_HEADS, DIM), np.float32)

    def layers(pages, q, k, v, meta):
        def layer(carry, index):
            q, pages = carry
            return pages.attend(index, q, k, v, meta), None

        return jax.lax.scan(layer, (q, pages), np.arange(LAYERS))[0]

    compiled = jax.jit(layers, donate_argnums=0).lower(cache_manager.pages, q, k, k, plan.metadata).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_manager.pages.nbytes
    assert memory.temp_size_in_bytes < cache_manager.pages.nbytes / 2


def test_refusal_and_reuse_of_rows():
    cache_manager = manager(rows=2)
    plan = cache_manager.step(["a", "b", "c"], [1, 2, 3], num_rows=4, num_tokens=8)
    assert plan.ok.tolist() == [True, True, False]
    assert plan.metadata.slot_mapping[3:].tolist() == [-1] * 5
    assert cache_manager.get_num_free_blocks() == 0
    plan = cache_manager.step(["b", "c"], [1, 3], free=["a"], num_rows=4, num_tokens=8)
    assert plan.ok.all()
    assert plan.metadata.positions[:4].tolist() == [2, 0, 1, 2]
    cache_manager.free("b")
    cache_manager.free("c")
    assert cache_manager.get_num_free_blocks() == 2


def test_errors_leave_rows_as_they_were():
    cache_manager = manager(rows=2)
    cache_manager.step(["a"], [4], num_tokens=4)
    with pytest.raises(UnknownRequestError, match="want"):
        cache_manager.step([], [], free=["a", "x"], num_rows=1)
    with pytest.raises(UnknownRequestError):
        cache_manager.free("x")
    with pytest.raises(RequestTooLongError, match=str(MAX_LEN)):
        cache_manager.step(["a"], [MAX_LEN - 3], num_tokens=MAX_LEN, free=[])
    assert cache_manager.step(["a"], [1]).metadata.positions.tolist() == [4]
    with pytest.raises(InvalidArgumentError, match="whole row"):
        DenseCacheManager(KVCacheConfig(num_layers=1, num_heads=1, head_dim=8, num_blocks=2, max_model_len=64))


def test_what_serving_asks_of_every_cache():
    cache_manager = manager(rows=1)
    cache_manager.add_request("a", [1, 2, 3])
    cache_manager.add_request("b", [1, 2, 3])
    with pytest.raises(DuplicateRequestError, match="already here"):
        cache_manager.add_request("a", [4])
    assert cache_manager.preview("b") == AdmissionPreview(num_cached_tokens=0, num_blocks=1)
    assert cache_manager.step(["a", "b"], [3, 3], num_tokens=8).ok.tolist() == [True, False]
    with pytest.raises(UnknownRequestError, match="hold no row"):
        cache_manager.preview("a")
    with pytest.raises(InvalidArgumentError, match="'swap' for a dense cache"):
        cache_manager.preempt(["a"], "swap")
    with pytest.raises(UnknownRequestError):
        cache_manager.preempt(["a", "b"])
    assert cache_manager.preempt(["a"]) == {"a": "recompute"}
    assert cache_manager.preview("a").num_cached_tokens == 0
    assert cache_manager.step(["b"], [3], free=["a"], num_tokens=8).ok.all()
    with pytest.raises(UnknownRequestError):
        cache_manager.free("a")
    with pytest.raises(InvalidArgumentError, match="requests of their own"):
        cache_manager.fork("b", "c")
