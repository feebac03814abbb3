"""Text in, text out: a model with its tokenizer, and streaming that never shows half a character."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.errors import CallbackError, InvalidArgumentError
from pyagent_kv_jax.models import load_model, load_tokenizer
from pyagent_kv_jax.serving.generate import GenerationResult, generate, one_each
from pyagent_kv_jax.serving.sampling import GREEDY, SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text, piece by piece.

    The text of a token depends on its neighbours: a character may be spread over several byte tokens, and a leading
    space is dropped at the start of a text. So each piece is the difference of two decodings over a short window, and
    text that ends in an unfinished character is held back until the next token completes it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window = 0  # first token that is decoded again, as context
        self._shown = 0  # tokens before this one are shown

    def add(self, token: int) -> str:
        """Take one token; returns the text that is now certain, often "" ."""
        self._tokens.append(token)
        text = self._decode(len(self._tokens))
        if text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text held back, unfinished characters as U+FFFD."""
        return self._advance(self._decode(len(self._tokens)))

    def _advance(self, text: str) -> str:
        piece = text[len(self._decode(self._shown)) :]
        self._window, self._shown = self._shown, len(self._tokens)
        return piece

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[self._window : end], skip_special_tokens=True)
        return text


class TextResult(NamedTuple):
    """An answer as text, and as tokens; and the other answers where ``SamplingParams.n`` asked for several."""

    text: str
    tokens: GenerationResult
    other_samples: tuple[TextResult, ...] = ()


class LLM:
    """A model and its tokenizer.

    >>> llm = LLM.load("path/to/model")
    >>> llm.generate(["What is a list?"], SamplingParams(max_tokens=32))[0].text
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, sharding: CacheSharding | None = None) -> Self:
        """From a Hugging Face directory; onto a mesh where ``sharding`` names one.

        Raises:
            ModelLoadError: it cannot be loaded.
            ConfigError: query heads that the mesh's axes do not divide.
        """
        model, _ = load_model(directory, sharding=sharding)
        return cls(model, load_tokenizer(directory))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens as the tokenizer adds them.

        Raises:
            InvalidArgumentError: the prompt is empty.
        """
        ids: list[int] = self.tokenizer.encode(text).ids
        if not text or not ids:
            raise InvalidArgumentError(f"prompt: got {text!r}, want text of at least one token")
        return ids

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        on_text: Callable[[int, str], Any] | None = None,
        **options: Any,
    ) -> list[TextResult]:
        """Answer all prompts.

        Args:
            prompts: texts.
            sampling: for all, or one for each.
            on_text: ``on_text(index of answer, piece of text)`` as it comes; the pieces joined are the answer. Answers
                are counted as for ``on_token`` of ``generate``.
            **options: as ``generate``.

        Raises:
            InvalidArgumentError: an empty prompt.
            CallbackError: ``on_text`` raised; generation stopped.
        """
        params = one_each(sampling, len(prompts))
        streams = [IncrementalDetokenizer(self.tokenizer) for each in params for _ in range(each.n)]

        def on_token(index: int, token: int) -> None:
            if on_text is not None and (piece := streams[index].add(token)):
                on_text(index, piece)

        callback = None if on_text is None else on_token
        results = generate(self.model, [self.encode(p) for p in prompts], sampling=params, on_token=callback, **options)
        if on_text is not None:
            for index, stream in enumerate(streams):
                if piece := stream.finish():
                    _call(on_text, index, piece)
        return [self._text_of(result) for result in results]

    def _text_of(self, result: GenerationResult) -> TextResult:
        others = tuple(self._text_of(sample) for sample in result.other_samples)
        return TextResult(self._decode(result.token_ids), result, others)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _call(on_text: Callable[[int, str], Any], index: int, piece: str) -> None:
    try:
        on_text(index, piece)
    except Exception as cause:
        raise CallbackError(f"on_text({index}, {piece!r}) raised {cause!r}") from cause
