"""Whether two ways of serving give the same tokens, by the rule for runs whose sums are rounded in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyagent_kv_jax.serving.generate import GenerationResult

MARGIN = 1e-4
MAX_TIED_SHARE = 0.001

Regenerate = Callable[[list[list[int]], list[int]], list[GenerationResult]]


class Difference(NamedTuple):
    """A place where two runs chose different tokens.

    Attributes:
        request: index of the prompt.
        position: index among the request's generated tokens.
        reference, candidate: the tokens chosen.
        margin: best logit less second best in the reference run.
    """

    request: int
    position: int
    reference: int
    candidate: int
    margin: float


class Comparison(NamedTuple):
    """What ``compare_tokens`` found.

    Attributes:
        num_tokens: tokens compared.
        ties: differences where the margin is under 1e-4: either token is right.
        differences: all others.
    """

    num_tokens: int
    ties: list[Difference]
    differences: list[Difference]

    @property
    def equal(self) -> bool:
        """No real difference, and at most 0.1% ties."""
        return not self.differences and len(self.ties) <= MAX_TIED_SHARE * self.num_tokens

    def __str__(self) -> str:
        verdict = "the same" if self.equal else f"NOT the same: {self.differences[:3]}"
        return f"{self.num_tokens} tokens compared, {len(self.ties)} ties (margin < {MARGIN}); {verdict}"


def compare_tokens(
    prompts: Sequence[Sequence[int]],
    reference: Sequence[GenerationResult],
    candidate: Sequence[GenerationResult],
    regenerate: Regenerate,
) -> Comparison:
    """Compare token by token; after a tie, go on from the reference's choice.

    Args:
        prompts: token ids.
        reference: results with margins.
        candidate: results for the same prompts and parameters.
        regenerate: the candidate's greedy answers to ``(prompts, max_tokens of each)``, ignoring end tokens.
    """
    ties: list[Difference] = []
    differences: list[Difference] = []
    answers = {i: (0, result.token_ids) for i, result in enumerate(candidate)}  # request -> (from position, tokens)
    while answers:
        found = [
            difference
            for i, (start, tokens) in answers.items()
            if (difference := _first_difference(i, start, reference[i], tokens)) is not None
        ]
        tied = [difference for difference in found if difference.margin < MARGIN]
        differences += [difference for difference in found if difference.margin >= MARGIN]
        ties += tied
        going_on = [d for d in tied if d.position + 1 < len(reference[d.request].token_ids)]
        if not going_on:
            break
        known = [[*prompts[d.request], *reference[d.request].token_ids[: d.position + 1]] for d in going_on]
        lengths = [len(reference[d.request].token_ids) - d.position - 1 for d in going_on]
        results = regenerate(known, lengths)
        answers = {d.request: (d.position + 1, r.token_ids) for d, r in zip(going_on, results, strict=True)}
    return Comparison(sum(len(result.token_ids) for result in reference), ties, differences)


def _first_difference(
    request: int, start: int, reference: GenerationResult, tokens: Sequence[int]
) -> Difference | None:
    wanted = reference.token_ids[start:]
    assert reference.margins is not None
    for i, (want, got) in enumerate(zip(wanted, tokens, strict=False)):
        if want != got:
            return Difference(request, start + i, want, got, reference.margins[start + i])
    if len(wanted) != len(tokens):  # one of them ended early: no margin excuses that
        return Difference(request, start + min(len(wanted), len(tokens)), -1, -1, float("inf"))
    return None
