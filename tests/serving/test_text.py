"""Text in and out: streaming that never breaks a character, and the class around it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pyagent_kv_jax.errors import CallbackError, InvalidArgumentError
from pyagent_kv_jax.serving import LLM, IncrementalDetokenizer, SamplingParams


def make_tokenizer(vocab_size=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or 300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, näher über größe"] * 3, trainer)
    return tokenizer


BYTES = make_tokenizer()


def stream(tokens):
    detokenizer = IncrementalDetokenizer(BYTES)
    return [detokenizer.add(token) for token in tokens], detokenizer.finish()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_pieces_of_any_text_are_whole_characters_and_join_to_it(text):
    pieces, rest = stream(BYTES.encode(text).ids)
    assert "".join(pieces) + rest == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert rest == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=30))
def test_pieces_of_any_tokens_join_to_what_they_decode_to(tokens):
    pieces, rest = stream(tokens)
    assert "".join(pieces) + rest == BYTES.decode(tokens, skip_special_tokens=True)


def test_a_character_of_several_tokens_is_held_back():
    tokens = BYTES.encode("a\N{GRINNING FACE}b").ids
    pieces, rest = stream(tokens)
    assert len(tokens) == 6
    assert [piece for piece in pieces if piece] == ["a", "\N{GRINNING FACE}", "b"]
    assert rest == ""


def test_spaces_that_are_dropped_at_the_start_of_a_text_are_kept_inside():
    """As in the tokenizers of Llama 2, whose decoder strips the first space of whatever it is given."""
    tokenizer = Tokenizer(models.WordLevel({"\u2581the": 0, "\u2581cat": 1, "s": 2}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.add(token) for token in (0, 1, 2, 0, 1)] == ["the", " cat", "s", " the", " cat"]
    assert detokenizer.finish() == ""


class Letters:
    """A tokenizer for the small model's vocabulary: one character a token."""

    def encode(self, text):
        return type("Encoding", (), {"ids": [ord(c) - 32 for c in text]})

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(token + 32) for token in tokens)


def test_llm_streams_what_it_returns():
    llm = LLM(small_model(), Letters())
    pieces = {0: [], 1: []}
    results = llm.generate(
        ["hello", "a cat"],
        SamplingParams(max_tokens=7),
        on_text=lambda i, piece: pieces[i].append(piece),
        max_num_seqs=4,
        token_budget=16,
    )
    assert ["".join(pieces[i]) for i in range(2)] == [result.text for result in results]
    assert [len(result.tokens.token_ids) for result in results] == [7, 7]
    with pytest.raises(InvalidArgumentError, match="want text"):
        llm.generate(["hello", ""])

    def on_text(index, piece):
        raise RuntimeError("boom")

    with pytest.raises(CallbackError, match="boom"):
        llm.generate(["hello"], SamplingParams(max_tokens=7), on_text=on_text, max_num_seqs=4, token_budget=16)
