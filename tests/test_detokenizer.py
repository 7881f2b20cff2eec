"""Token ids into text as they come, held against the tokenizer's own decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from predictor.checkpoints.tokenizer import gpt2_tokenizer
from predictor.text.detokenizer import new_detokenizer
from predictor.text.vocabulary import Vocabulary
from tests.conftest import byte_tokenizer

REPLACEMENT = "\ufffd"

# Characters of one to four bytes, joined and combining ones, a flag, and what the tokenizers treat specially.
WORDS = [
    "hello",
    " the",
    " then",
    "é",
    "ß",
    "中文",
    "日本",
    "😀",
    "👩\u200d👩\u200d👧",
    "🇫🇷",
    "e\u0301",
    "\n",
    "\t",
    "\x00",
    "  ",
]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=12).map("".join))


@cache
def tiny() -> Vocabulary:
    return Vocabulary(byte_tokenizer())


@cache
def gpt2() -> Vocabulary:
    return Vocabulary(gpt2_tokenizer())


@cache
def metaspace() -> Vocabulary:
    """Llama's kind of tokenizer: pieces that begin with U+2581 for a space, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "hello", "world", "he", "llo", "▁the", "é", "中", "▁▁", ",", "."]
    pieces += list("abcdefghijklmnopqrstuvwxyz")
    merges = [("he", "llo")] + [("▁", word) for word in ("hello", "world")] + [("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Vocabulary(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


@cache
def unigram() -> Vocabulary:
    """T5's kind: Unigram with the Metaspace decoder and no byte tokens."""
    pieces = [
        ("<unk>", 0.0),
        ("▁hello", -1.0),
        ("▁world", -1.5),
        ("▁", -3.0),
        ("wor", -3.5),
        ("ld", -3.5),
        ("中", -5.0),
    ]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def pushes(vocabulary: Vocabulary, ids: Iterable[int]) -> list[str]:
    detokenizer = new_detokenizer(vocabulary)
    return [detokenizer.push(token_id) for token_id in ids]


def decode(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    return vocabulary.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def assert_equal_but_for_a_cut_character(streamed: str, whole: str) -> None:
    """`streamed` is `whole`, or lacks one replacement character at the end: bytes that wait for more."""
    assert streamed in (whole, whole.removesuffix(REPLACEMENT))


@given(ids=st.lists(st.integers(0, len(byte_tokenizer()) - 1), max_size=40))
@settings(deadline=None, max_examples=500)
def test_any_ids_give_the_tokenizers_own_text(ids: list[int]) -> None:
    assert_equal_but_for_a_cut_character("".join(pushes(tiny(), ids)), decode(tiny(), ids))


@given(ids=st.lists(st.integers(0, 50_256), max_size=40))
@settings(deadline=None, max_examples=200)
def test_any_ids_of_gpt2_give_the_tokenizers_own_text(ids: list[int]) -> None:
    assert_equal_but_for_a_cut_character("".join(pushes(gpt2(), ids)), decode(gpt2(), ids))


@given(text=TEXTS)
@example(text="a<|endoftext|>b")
@settings(deadline=None, max_examples=300)
def test_encoded_text_comes_back_whole_at_once(text: str) -> None:
    """But for the end token, which is no text: hypothesis finds its name among the constants of the code."""
    whole = text.replace("<|endoftext|>", "")
    for vocabulary in (tiny(), gpt2()):
        streamed = pushes(vocabulary, vocabulary.encode(text))
        assert "".join(streamed) == whole
        # What is out is always the text's beginning: nothing sent is ever taken back.
        assert all(whole.startswith(sent) for sent in accumulate(streamed))


@pytest.mark.parametrize("text", ["😀", "中", "é", "👩\u200d👩\u200d👧", "a😀b", "日本語", "🇫🇷"])
@pytest.mark.parametrize("make", [tiny, gpt2, metaspace])
def test_a_character_split_over_tokens_never_shows_as_a_replacement_character(make: object, text: str) -> None:
    vocabulary = make()
    ids = vocabulary.encode(text)
    streamed = pushes(vocabulary, ids)
    assert not any(REPLACEMENT in piece for piece in streamed)
    assert "".join(streamed) == text
    if text == "😀":
        assert streamed[:-1] == [""] * (len(ids) - 1)


@pytest.mark.parametrize("make", [tiny, gpt2, metaspace])
def test_a_character_that_the_end_cuts_in_two_is_left_out(make: object) -> None:
    vocabulary = make()
    ids = vocabulary.encode("hello😀")
    assert len(ids) > len(vocabulary.encode("hello")) + 1
    assert "".join(pushes(vocabulary, ids[:-1])) == "hello"


def ids_of_bytes(vocabulary: Vocabulary, text: bytes) -> list[int]:
    return [vocabulary.token_bytes.index(bytes([byte])) for byte in text]


@pytest.mark.parametrize(
    "raw", [b"a\xffb", b"\x80\x80z", b"\xf0\x9f\x98a", b"\xe4\xb8\xe4\xb8\xad.", b"\xed\xa0\x80!", b"\xc0\xafx"]
)
def test_bytes_that_can_be_no_character_show_as_replacement_characters(raw: bytes) -> None:
    ids = ids_of_bytes(tiny(), raw)
    streamed = "".join(pushes(tiny(), ids))
    assert streamed == decode(tiny(), ids) == raw.decode(errors="replace")
    assert REPLACEMENT in streamed


def test_special_tokens_are_no_text() -> None:
    assert pushes(tiny(), [0]) == [""]
    ids = [*tiny().encode("hello"), 0, *tiny().encode(" world"), 0]
    assert "".join(pushes(tiny(), ids)) == "hello world"
    assert pushes(gpt2(), [50_256]) == [""]


def test_special_tokens_the_tokenizer_gives_no_role_are_no_text(tmp_path: Path) -> None:
    # <|user|> is special in tokenizer.json, but neither bos, eos, unk nor pad.
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(tmp_path))
    ids = vocabulary.encode("hello<|user|> world")
    assert decode(vocabulary, ids) == "hello world"
    assert "".join(pushes(vocabulary, ids)) == "hello world"


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[NAME]", "two words"])
    vocabulary = Vocabulary(tokenizer)
    ids = vocabulary.encode("hello[NAME] and two words.")
    assert {len(tokenizer) - 1, len(tokenizer) - 2} <= set(ids)
    assert "".join(pushes(vocabulary, ids)) == decode(vocabulary, ids) == "hello[NAME] and two words."


@pytest.mark.parametrize("make", [tiny, metaspace, unigram])
def test_ids_past_the_tokenizer_are_no_text(make: object) -> None:
    vocabulary = make()
    past = len(vocabulary.tokenizer)
    hello = vocabulary.encode("hello world")
    assert pushes(vocabulary, [past]) == [""]
    assert "".join(pushes(vocabulary, [*hello[:1], past, past + 5_000, *hello[1:]])) == "hello world"


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    first, *rest = ids_of_bytes(tiny(), "é".encode())
    assert "".join(pushes(tiny(), [first, 0, *rest])) == decode(tiny(), [first, 0, *rest]) == "é"


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_byte_level_tokenizers_are_known_as_such(make: object) -> None:
    assert make().byte_level


@pytest.mark.parametrize("make", [metaspace, unigram])
def test_other_tokenizers_are_known_as_such(make: object) -> None:
    assert not make().byte_level


@given(text=st.one_of(TEXTS, st.lists(st.sampled_from(["hello", "world", " ", "the", ",", "中", "😀"])).map("".join)))
@settings(deadline=None, max_examples=300)
def test_window_gives_the_text_of_a_tokenizer_with_spacing_rules(text: str) -> None:
    ids = metaspace().encode(text)
    streamed = pushes(metaspace(), ids)
    assert all(decode(metaspace(), ids).startswith(sent) for sent in accumulate(streamed))
    assert "".join(streamed) == decode(metaspace(), ids).rstrip(REPLACEMENT)


@given(words=st.lists(st.sampled_from(["hello", "world", "a", "中", ",", "", "w"]), max_size=15))
@settings(deadline=None, max_examples=200)
def test_window_keeps_the_spaces_between_words(words: list[str]) -> None:
    ids = unigram().encode(" ".join(words))
    assert "".join(pushes(unigram(), ids)) == decode(unigram(), ids)


def test_window_says_a_space_with_the_word_it_belongs_to() -> None:
    ids = unigram().encode("hello world hello")
    assert pushes(unigram(), ids) == ["hello", " world", " hello"]


def test_window_skips_special_tokens() -> None:
    begin, end = metaspace().tokenizer.bos_token_id, metaspace().tokenizer.eos_token_id
    ids = [begin, *metaspace().encode("hello world"), end]
    assert "".join(pushes(metaspace(), ids)) == "hello world"


def test_window_work_per_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = metaspace()
    lengths: list[int] = []
    real = vocabulary.tokenizer.decode

    def counting(ids: list[int], **options: object) -> str:
        lengths.append(len(ids))
        return real(ids, **options)

    monkeypatch.setattr(vocabulary.tokenizer, "decode", counting)
    pushes(vocabulary, vocabulary.encode("hello world " * 50))
    assert max(lengths) <= 4
