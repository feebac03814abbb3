"""The sampler against numpy: exact sets, right frequencies, and no token that depends on its neighbours."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.serving.sampling import SamplingArrays, SamplingParams, sample, sample_jit, top2_margin

VOCAB = 37


def random_logits(rows, seed=0, vocab=VOCAB, spread=2.0):
    return np.random.default_rng(seed).normal(scale=spread, size=(rows, vocab)).astype(np.float32)


def arrays(params, seeds=None, indices=None, num_rows=None):
    n = len(params)
    seeds = range(n) if seeds is None else seeds
    indices = [0] * n if indices is None else indices
    return SamplingArrays.from_rows(params, list(seeds), list(indices), num_rows or n)


def draw(logits_row, params, draws):
    """``draws`` samples of one distribution, each from its own seed."""
    logits = np.broadcast_to(logits_row, (draws, len(logits_row)))
    return np.asarray(sample_jit(logits, arrays([params] * draws)))


def kept_by_numpy(logits_row, params):
    """The tokens that may be sampled, and their probabilities; written with python loops, in float64."""
    scaled = logits_row.astype(np.float64) / params.temperature
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: params.top_k or len(scaled)]
    weights = np.exp(scaled[ranked] - scaled[ranked[0]])
    weights /= weights.sum()
    kept, reached = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if reached >= params.top_p and params.top_p < 1:
            break
        kept.append(token)
        reached += weight
    probabilities = weights[: len(kept)] / weights[: len(kept)].sum()
    return dict(zip(kept, probabilities, strict=True))


def test_greedy_takes_the_best_logit():
    logits = random_logits(9)
    chex.assert_trees_all_equal(
        np.asarray(sample_jit(logits, arrays([SamplingParams()] * 9))), logits.argmax(-1).astype(np.int32)
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=12, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_set_and_frequencies_are_those_of_numpy(params):
    logits = random_logits(1, seed=3, spread=1.0)[0]
    want, draws = kept_by_numpy(logits, params), 20_000
    counts = np.bincount(draw(logits, params, draws), minlength=VOCAB)
    if params.top_k or params.top_p < 1:  # few enough that each shows up
        assert set(np.flatnonzero(counts)) == set(want)
    expected = np.array([want.get(token, 0.0) for token in range(VOCAB)])
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(counts / draws - expected) <= 5 * deviation + 1e-12)


def test_ties_at_the_edge_of_top_k_are_cut_by_token_id():
    logits = np.zeros(VOCAB, np.float32)
    drawn = draw(logits, SamplingParams(temperature=1.0, top_k=3), 500)
    assert set(drawn.tolist()) == {0, 1, 2}


def test_a_row_depends_on_its_own_seed_and_index_only():
    logits = random_logits(8)
    mixed = [
        SamplingParams(temperature=0.9),
        SamplingParams(),
        SamplingParams(temperature=0.9, top_k=4),
        SamplingParams(temperature=2.0, top_p=0.5),
    ] * 2
    seeds, indices = [5, 5, 7, 2**32 - 1, 11, 12, 13, 0], [0, 3, 1, 4, 1, 5, 9, 2]
    together = np.asarray(sample_jit(logits, arrays(mixed, seeds, indices)))
    order = np.random.default_rng(1).permutation(8)
    shuffled = sample_jit(
        logits[order],
        arrays([mixed[i] for i in order], [seeds[i] for i in order], [indices[i] for i in order], num_rows=8),
    )
    chex.assert_trees_all_equal(np.asarray(shuffled), together[order])
    for i in range(8):  # alone, the batch takes another branch of the sampler
        alone = sample_jit(logits[i : i + 1], arrays(mixed[i : i + 1], seeds[i : i + 1], indices[i : i + 1]))
        assert int(alone[0]) == together[i]


def test_seed_and_index_both_matter():
    logits, params = np.zeros((64, 1000), np.float32), [SamplingParams(temperature=1.0)] * 64
    base = np.asarray(sample_jit(logits, arrays(params)))
    assert len(set(base.tolist())) > 50
    assert np.mean(base == np.asarray(sample_jit(logits, arrays(params, indices=[1] * 64)))) < 0.1
    assert np.mean(base == np.asarray(sample_jit(logits, arrays(params, seeds=range(100, 164))))) < 0.1


def test_any_mix_is_one_compilation():
    traced = jax.jit(chex.assert_max_traces(sample, n=1))
    for params in ([SamplingParams()] * 3, [SamplingParams(temperature=1.0), SamplingParams(top_k=3)]):
        traced(random_logits(3), arrays(params, num_rows=3))


def test_a_greedy_batch_does_not_sort_or_draw():
    """Sorting and drawing stand inside a conditional branch, never at the top of the program."""
    jaxpr = jax.make_jaxpr(sample)(random_logits(3), arrays([SamplingParams()] * 3))
    top = {str(eqn.primitive) for eqn in jaxpr.eqns}
    assert "cond" in top
    assert not {"sort", "random_bits", "threefry2x32", "random_fold_in"} & top


def test_tiny_temperature_is_greedy_and_nan_logits_show():
    logits = random_logits(2)
    params = [SamplingParams(temperature=1e-30)] * 2
    chex.assert_trees_all_equal(np.asarray(sample_jit(logits, arrays(params))), logits.argmax(-1).astype(np.int32))
    logits[1, 4] = np.nan
    for each in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=2)):
        tokens = np.asarray(sample_jit(logits, arrays([each] * 2)))
        assert tokens[0] >= 0
        assert tokens[1] == -1


def test_minus_infinity_is_never_sampled():
    logits = np.full((50, VOCAB), -np.inf, np.float32)
    logits[:, [3, 8]] = 0.0
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.99)):
        assert set(np.asarray(sample_jit(logits, arrays([params] * 50))).tolist()) == {3, 8}


def test_top2_margin():
    logits = random_logits(6)
    ranked = np.sort(logits, axis=-1)
    chex.assert_trees_all_close(np.asarray(top2_margin(jnp.asarray(logits))), ranked[:, -1] - ranked[:, -2])
    assert float(top2_margin(jnp.zeros((1, 4)))[0]) == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("stop_token_ids", (3, -1)),
        ("stop_token_ids", "ab"),
        ("stop_token_ids", 5),
    ],
)
def test_bad_parameters_say_what_they_got_and_want(field, value):
    with pytest.raises(InvalidArgumentError, match=f"{field}: got .*, want "):
        SamplingParams(**{field: value})
