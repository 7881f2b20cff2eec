"""Banned strings never appear, however the model could spell them."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.checkpoints.tokenizer import gpt2_tokenizer
from predictor.text.banned import BannedStrings
from predictor.text.vocabulary import Vocabulary
from tests.conftest import byte_tokenizer


@cache
def tiny() -> Vocabulary:
    return Vocabulary(byte_tokenizer())


@cache
def gpt2() -> Vocabulary:
    return Vocabulary(gpt2_tokenizer())


def text_of(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.token_bytes[token_id] for token_id in ids if token_id < len(vocabulary.token_bytes))


def tokens_spelling(vocabulary: Vocabulary, text: bytes) -> list[int]:
    return [token_id for token_id, token in enumerate(vocabulary.token_bytes) if token == text]


def naive(vocabulary: Vocabulary, strings: list[str], before: list[int]) -> set[int]:
    """The definition: the tokens after which some banned string ends inside the new token."""
    text = text_of(vocabulary, before)
    found = set()
    for token_id, token in enumerate(vocabulary.token_bytes):
        for string in map(str.encode, strings):
            start = (text + token).find(string, max(0, len(text) - len(string) + 1))
            if token and start >= 0:
                found.add(token_id)
    return found


# Words whose tokens overlap: "the", "then" and "there" are tokens, or parts of tokens, of the tiny tokenizer.
STRINGS = st.lists(
    st.one_of(
        st.sampled_from(["the", "hen", " wor", "banana", "ana", "aa", "é", "😀", "中文", "h", "\n\n", "lo w"]),
        st.text(st.sampled_from("abehlnort é😀"), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)
WALKS = st.integers(0, 2**32)


@given(strings=STRINGS, before=st.lists(st.integers(0, len(byte_tokenizer()) - 1), max_size=12))
@settings(deadline=None, max_examples=200)
def test_exactly_the_tokens_that_complete_a_banned_string_are_banned(strings: list[str], before: list[int]) -> None:
    banned = BannedStrings(strings, tiny()).banned_after(before)
    assert len(banned) == len(set(banned))
    assert set(banned) == naive(tiny(), strings, before)


@given(
    strings=STRINGS,
    prompt=st.one_of(
        st.just(""), st.sampled_from(["the", "ban", "hello wo", "\n", "中"]), st.text("aehnt", max_size=5)
    ),
    walk=WALKS,
)
@settings(deadline=None, max_examples=150)
def test_a_walk_that_keeps_the_bans_never_spells_a_banned_string(strings: list[str], prompt: str, walk: int) -> None:
    vocabulary = tiny()
    filter_ = BannedStrings(strings, vocabulary)
    ids = vocabulary.encode(prompt)
    before = len(text_of(vocabulary, ids))
    # A walk that wants to offend: it draws among tokens made of the banned strings' own bytes.
    wanted = set("".join(strings).encode())
    liked = [i for i, token in enumerate(vocabulary.token_bytes) if token and set(token) <= wanted]
    choose = random.Random(walk)
    for _ in range(40):
        banned = set(filter_.banned_after(ids))
        allowed = [i for i in liked if i not in banned] or [
            i for i in range(len(vocabulary.token_bytes)) if i not in banned
        ]
        ids.append(choose.choice(allowed))
    text = text_of(vocabulary, ids)
    for string in map(str.encode, strings):
        # It may stand in the prompt; it may not end in what was generated.
        assert text.find(string, max(0, before - len(string) + 1)) == -1, (string, text)


def test_a_greedy_walk_along_the_banned_string_is_stopped_before_its_last_token() -> None:
    vocabulary = tiny()
    filter_ = BannedStrings(["banana split"], vocabulary)
    ids: list[int] = []
    for byte in b"banana spli":
        (token,) = tokens_spelling(vocabulary, bytes([byte]))
        assert token not in filter_.banned_after(ids)
        ids.append(token)
    (last,) = tokens_spelling(vocabulary, b"t")
    assert last in filter_.banned_after(ids)


def test_a_string_inside_one_token_bans_that_token() -> None:
    (there,) = tokens_spelling(tiny(), b" there")
    assert there in BannedStrings(["her"], tiny()).banned_after([])


def test_a_token_that_goes_on_past_the_string_is_banned_too() -> None:
    (token,) = tokens_spelling(tiny(), b" world") or tokens_spelling(tiny(), b" word")
    (o,) = tokens_spelling(tiny(), b"o")
    assert token in BannedStrings(["o w"], tiny()).banned_after([o])
    assert token not in BannedStrings(["o w"], tiny()).banned_after([])


def test_the_same_string_is_banned_in_every_cutting() -> None:
    vocabulary = gpt2()
    filter_ = BannedStrings(["hello"], vocabulary)
    for cut in range(1, 5):
        for head in tokens_spelling(vocabulary, b"hello"[:cut]):
            for rest in tokens_spelling(vocabulary, b"hello"[cut:]):
                assert rest in filter_.banned_after([head])
    for whole in tokens_spelling(vocabulary, b"hello") + tokens_spelling(vocabulary, b" hello"):
        assert whole in filter_.banned_after([])


@pytest.mark.parametrize("string", ["😀", "é", "中文", "e\u0301", "\x00"])
def test_a_character_of_many_bytes_is_banned_byte_by_byte(string: str) -> None:
    filter_, ids = BannedStrings([string], tiny()), []
    raw = string.encode()
    for place, byte in enumerate(raw):
        (token,) = tokens_spelling(tiny(), bytes([byte]))
        assert (token in filter_.banned_after(ids)) == (place == len(raw) - 1)
        ids.append(token)


def test_characters_that_share_bytes_with_a_banned_one_stay_allowed() -> None:
    filter_ = BannedStrings(["é"], tiny())  # c3 a9; è is c3 a8
    (first,) = tokens_spelling(tiny(), b"\xc3")
    (other,) = tokens_spelling(tiny(), b"\xa8")
    assert other not in filter_.banned_after([first])


def test_the_prompts_end_counts() -> None:
    prompt = tiny().encode("say ban")
    (rest,) = tokens_spelling(tiny(), b"a")
    filter_ = BannedStrings(["bana"], tiny())
    assert rest in filter_.banned_after(prompt)
    assert rest not in filter_.banned_after(tiny().encode("say be"))


def test_a_string_that_stands_in_the_prompt_bans_only_its_repetition() -> None:
    prompt = tiny().encode("banana")
    banned = BannedStrings(["banana"], tiny()).banned_after(prompt)
    assert set(banned) == naive(tiny(), ["banana"], prompt)


def test_a_special_token_between_the_halves_does_not_hide_the_string() -> None:
    # It is no text, so the reader would see both halves joined.
    (a,), (b,) = tokens_spelling(tiny(), b"a"), tokens_spelling(tiny(), b"b")
    assert b in BannedStrings(["ab"], tiny()).banned_after([a, 0])


def test_ids_past_the_tokenizer_are_no_text_between_the_halves() -> None:
    (a,), (b,) = tokens_spelling(tiny(), b"a"), tokens_spelling(tiny(), b"b")
    assert b in BannedStrings(["ab"], tiny()).banned_after([a, 100_000])


def test_special_tokens_are_never_banned() -> None:
    assert 0 not in BannedStrings(["<|endoftext|>", "a"], tiny()).banned_after([])


def test_no_strings_ban_nothing() -> None:
    assert list(BannedStrings([], tiny()).banned_after([1, 2, 3])) == []


@pytest.mark.parametrize("string", ["a.c", "[ab]", "a|b", "(", "\\"])
def test_strings_are_no_patterns(string: str) -> None:
    abc = tiny().encode("a")
    banned = BannedStrings([string], tiny()).banned_after(abc)
    assert set(banned) == naive(tiny(), [string], abc)
