"""The rule for comparing runs: ties are counted and passed over, anything else is a difference."""

from pyagent_kv_jax.serving.generate import GenerationResult
from pyagent_kv_jax.serving.token_equality import compare_tokens


def result(tokens, margins=None):
    return GenerationResult(list(tokens), "length", 0, margins)


def never(prompts, max_tokens):
    raise AssertionError("nothing to generate again")


def test_equal_runs():
    comparison = compare_tokens([[1]], [result([5, 6], [1.0, 1.0])], [result([5, 6])], never)
    assert comparison.equal
    assert (comparison.num_tokens, comparison.ties, comparison.differences) == (2, [], [])


def test_a_clear_choice_that_differs_is_a_difference():
    comparison = compare_tokens([[1]], [result([5, 6], [1.0, 2e-4])], [result([5, 7])], never)
    assert not comparison.equal
    assert [(d.position, d.reference, d.candidate) for d in comparison.differences] == [(1, 6, 7)]
    assert "NOT" in str(comparison)


def test_after_a_tie_the_comparison_restarts_from_the_references_choice():
    asked = []

    def regenerate(prompts, max_tokens):
        asked.append((prompts, max_tokens))
        return [result(range(12, 2000)) if len(asked) == 1 else result([])]

    reference = result(range(10, 2000), [1.0, 5e-5] + [1.0] * 1988)
    comparison = compare_tokens([[1, 2]], [reference], [result([10, 99, 98, 97])], regenerate)
    assert asked == [([[1, 2, 10, 11]], [1988])]
    assert comparison.equal
    assert len(comparison.ties) == 1

    def regenerate_wrongly(prompts, max_tokens):
        return [result([12, 0, *range(14, 2000)])]

    comparison = compare_tokens([[1, 2]], [reference], [result([10, 99, 98, 97])], regenerate_wrongly)
    assert [d.position for d in comparison.differences] == [3]


def test_too_many_ties_are_not_equal():
    comparison = compare_tokens([[1]], [result([5, 6], [1.0, 1e-6])], [result([5, 7])], never)
    assert len(comparison.ties) == 1
    assert not comparison.equal


def test_an_early_end_is_a_difference():
    comparison = compare_tokens([[1]], [result([5, 6], [1e-6, 1e-6])], [result([5])], never)
    assert not comparison.equal
