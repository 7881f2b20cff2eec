"""A tokenizer seen as a table of bytes."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from predictor.checkpoints.tokenizer import gpt2_tokenizer
from predictor.text.vocabulary import Vocabulary
from tests.conftest import byte_tokenizer


@cache
def tiny() -> Vocabulary:
    return Vocabulary(byte_tokenizer())


@cache
def gpt2() -> Vocabulary:
    return Vocabulary(gpt2_tokenizer())


@cache
def words() -> Vocabulary:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_token_bytes_spell_what_the_tokenizer_decodes(make: object) -> None:
    vocabulary = make()
    for token_id, token in enumerate(vocabulary.token_bytes):
        decoded = vocabulary.tokenizer.decode([token_id], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert token.decode(errors="replace") == decoded


@given(text=st.text(max_size=60))
@example(text="a<|endoftext|>b")
@settings(deadline=None, max_examples=200)
def test_the_bytes_of_encoded_text_are_its_utf8(text: str) -> None:
    """But for the end token, which is no text: hypothesis finds its name among the constants of the code."""
    wanted = text.replace("<|endoftext|>", "").encode()
    for vocabulary in (tiny(), gpt2()):
        assert b"".join(vocabulary.token_bytes[token_id] for token_id in vocabulary.encode(text)) == wanted


def test_every_byte_is_a_token() -> None:
    for vocabulary in (tiny(), gpt2()):
        assert {bytes([byte]) for byte in range(256)} <= set(vocabulary.token_bytes)


def test_special_tokens_have_no_bytes() -> None:
    assert tiny().token_bytes[0] == b""
    assert gpt2().token_bytes[50_256] == b""
    assert gpt2().end_token == 50_256


def test_encode_adds_no_special_tokens_and_takes_written_ones_as_one() -> None:
    assert gpt2().encode("") == []
    assert gpt2().encode("a<|endoftext|>b") == [64, 50_256, 65]


def test_sorted_tokens_are_every_token_with_text_in_order() -> None:
    tokens = tiny().sorted_tokens
    assert tokens == sorted(tokens)
    assert {token_id for _, token_id in tokens} == set(range(len(tiny().tokenizer))) - {0}


def test_longest_token_bounds_every_token() -> None:
    assert tiny().longest_token == max(map(len, tiny().token_bytes))
    assert gpt2().longest_token == 128  # "ÃÂÃÂ...", which scraped pages repeat


def test_no_text_within_the_context_is_longer_than_the_longest_token_allows() -> None:
    # LanguageModel refuses prompts of more than context x longest_token characters without encoding them.
    text = "Ã\u0082" * 200
    assert len(text) <= len(gpt2().encode(text)) * gpt2().longest_token


def test_a_tokenizer_of_words_is_not_byte_level() -> None:
    assert not words().byte_level
    assert words().longest_token == 0


def test_a_byte_level_pre_tokenizer_alone_is_not_byte_level() -> None:
    # What counts is how ids become text.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.WordPiece()
    assert not Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).byte_level


def test_show_gives_a_token_as_a_person_reads_it() -> None:
    vocabulary = gpt2()
    assert vocabulary.show(vocabulary.encode(" the")[0]) == " the"
    assert vocabulary.show(50_256) == "<|endoftext|>"
    assert vocabulary.show(60_000) == ""
    first_of_emoji = vocabulary.encode("😀")[0]
    assert "\ufffd" in vocabulary.show(first_of_emoji)
    assert words().show(1) == "hello"
