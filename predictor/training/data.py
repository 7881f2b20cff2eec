"""Text files to token ids, and token ids to batches. Must not know the model or the optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from predictor.errors import InvalidRequest

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 0.1
# The target of a position that has none; torch's cross_entropy skips it by default.
NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class SplitText:
    """The characters of all files: the first 90 % of each for training, its last 10 % for validation."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenData:
    """Token ids [N] int64 of both parts; files are joined by <|endoftext|>."""

    train: Tensor
    validation: Tensor
    validation_bytes: int  # of the UTF-8 text that `validation` encodes

    def fingerprint(self) -> str:
        """A hash that changes with the text, its split and the tokenizer."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(part.numel().to_bytes(8, "little"))
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def read_text(paths: Sequence[Path]) -> SplitText:
    """Read UTF-8 files, line ends kept; raises InvalidRequest for one that is missing, empty or not UTF-8."""
    train: list[str] = []
    validation: list[str] = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise InvalidRequest(f"data: cannot read {path}: {error.strerror}", param="data") from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"data: {path} is not UTF-8 at byte {error.start:,}", param="data") from error
        border = int(len(text) * (1 - VALIDATION_SHARE))
        if border == 0 or border == len(text):
            raise InvalidRequest(f"data: {path} must hold at least 2 characters, got {len(text)}", param="data")
        train.append(text[:border])
        validation.append(text[border:])
    return SplitText(tuple(train), tuple(validation))


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most `vocabulary` tokens, a short text gives fewer.

    <|endoftext|> is id 0 and the only special token. Every string round-trips: all 256 bytes are tokens.
    Source: Radford et al. 2019, section 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # transformers leaves it untyped
    return make(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_text(text: SplitText, tokenizer: PreTrainedTokenizerBase) -> TokenData:
    """Encode both parts; a literal <|endoftext|> in the text becomes that token."""
    size = sum(len(part.encode("utf-8")) for part in text.validation)
    return TokenData(_encode(text.train, tokenizer), _encode(text.validation, tokenizer), size)


def check_length(data: TokenData, context: int) -> None:
    """Raise InvalidRequest unless one training window and one validation target fit."""
    if data.train.numel() < context + 1:
        raise InvalidRequest(
            f"data must hold at least {context + 1:,} tokens in its first 90 % (context + 1), "
            f"got {data.train.numel():,}",
            param="data",
        )
    if data.validation.numel() < 2:
        raise InvalidRequest("data must hold at least 2 tokens in its last 10 %, got 1", param="data")


def training_batch(ids: Tensor, context: int, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Cut inputs [B, T] and targets [B, T] at places that only (seed, step) decides; T is the context."""
    random = numpy.random.default_rng([seed, step])
    starts = torch.from_numpy(random.integers(0, ids.numel() - context, size=batch_size))
    windows = ids[starts[:, None] + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def validation_batches(ids: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs [B, T] and targets [B, T] in which every token but the first is a target once.

    Windows do not overlap, so the first token of a window is predicted from nothing before it but one token.
    The last window is filled with NO_TARGET.
    """
    count = ids.numel() - 1
    windows = -(-count // context)
    inputs = torch.zeros(windows * context, dtype=torch.int64)
    targets = torch.full((windows * context,), NO_TARGET, dtype=torch.int64)
    inputs[:count], targets[:count] = ids[:-1], ids[1:]
    inputs, targets = inputs.view(windows, context), targets.view(windows, context)
    for first in range(0, windows, batch_size):
        yield inputs[first : first + batch_size], targets[first : first + batch_size]


def _encode(parts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    ids: list[int] = []
    for index, part in enumerate(parts):
        if index and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        # verbose=False: no warning that the whole text is longer than one context
        ids.extend(tokenizer.encode(part, add_special_tokens=False, verbose=False))
    return torch.tensor(ids, dtype=torch.int64)
