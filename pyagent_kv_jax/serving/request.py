"""One request on its way from prompt to last token."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.serving.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(eq=False)
class Request:
    """A request and how far it has come. Only the scheduler changes it.

    Attributes:
        request_id: its name at the cache manager.
        prompt: i32[n], n >= 1.
        sampling: how it chooses tokens.
        seed: ``sampling.seed``, or the one drawn for it.
        stop_token_ids: all tokens it stops at, the model's own included unless ``sampling.ignore_eos``.
        arrival: order of arrival; lower is served first.
        num_computed: tokens whose K and V stand in the cache.
        output: tokens generated so far.
        num_preemptions: how often its blocks were taken away, to be computed again or brought back from the host.
        finish_reason: None while it is unfinished.
        samples: further answers to the same prompt, requests like this one.
        is_split: whether ``samples`` go their own ways; until then this one stands for all.
    """

    request_id: str
    prompt: np.ndarray
    sampling: SamplingParams
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    arrival: int = 0
    num_computed: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    samples: tuple[Request, ...] = ()
    is_split: bool = False
    _tokens: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = np.empty(len(self.prompt) + self.sampling.max_tokens, np.int32)
        self._tokens[: len(self.prompt)] = self.prompt

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt and what was generated."""
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Known tokens that the cache does not hold yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def max_cached_tokens(self) -> int:
        """Tokens the cache holds at most for it: the last one generated is never fed back."""
        return len(self.prompt) + self.sampling.max_tokens - 1

    @property
    def must_split(self) -> bool:
        """Whether its samples still wait for it to compute what they share."""
        return bool(self.samples) and not self.is_split

    def num_wanted(self, num_cached: int = 0) -> int:
        """Tokens to compute next, if ``num_cached`` more come for nothing and no budget sets a limit.

        Samples share the prompt but for its last token, which each computes. If that alone is left, full blocks are all
        there is to share, and the prefix cache sees to that.
        """
        left = self.num_pending - num_cached
        return left - 1 if self.must_split and left > 1 else left

    def next_tokens(self, skipped: int, count: int) -> np.ndarray:
        """i32[count], the tokens to compute next, after ``skipped`` that the cache has by itself."""
        return self._tokens[self.num_computed + skipped : self.num_computed + skipped + count]

    def append(self, token: int) -> None:
        """Take one generated token, and note the reason if it is the last."""
        self._tokens[self.num_tokens] = token
        self.output.append(token)
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.output) == self.sampling.max_tokens:
            self.finish_reason = "length"


def flat_tokens(prompt: Any) -> np.ndarray:
    """A prompt's token ids as integers [n].

    Raises:
        InvalidArgumentError: no flat sequence of integers: a text, several prompts in one, a lone token.
    """
    if isinstance(prompt, str):
        raise InvalidArgumentError(f"prompt: got the text {prompt[:40]!r}, want token ids")
    try:
        tokens = np.asarray(prompt)
    except ValueError as error:  # ragged nesting
        raise InvalidArgumentError(f"prompt: got {prompt!r}, want a flat sequence of token ids") from error
    if tokens.ndim != 1 or not (tokens.size == 0 or np.issubdtype(tokens.dtype, np.integer)):
        raise InvalidArgumentError(
            f"prompt: got {tokens.dtype} of shape {tokens.shape}, want a flat sequence of integer token ids"
        )
    return tokens
