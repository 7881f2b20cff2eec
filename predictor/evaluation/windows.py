"""A text into windows of token ids. Must not know the models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from predictor.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one length, each the next piece of the text."""

    ids: list[list[int]]
    tokens_left_out: int  # at the end of the text, less than a window or past the number asked for

    @property
    def length(self) -> int:
        """Tokens in each window."""
        return len(self.ids[0])


def read_windows(path: Path, tokenizer: PreTrainedTokenizerBase, context: int, at_most: int | None) -> Windows:
    """Cut a UTF-8 file into consecutive windows of `context` tokens that do not overlap.

    A text shorter than the context is one shorter window. Raises ConfigurationError for a file that cannot be read
    or holds less than two tokens: a window's first token is predicted from nothing.
    """
    ids: list[int] = tokenizer.encode(_read(path), add_special_tokens=False, verbose=False)
    if len(ids) < 2:
        raise ConfigurationError(f"--text {path} must hold at least 2 tokens, got {len(ids)}")
    length = min(context, len(ids))
    count = len(ids) // length
    if at_most is not None:
        count = min(count, at_most)
    return Windows([ids[i * length : (i + 1) * length] for i in range(count)], len(ids) - count * length)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--text: {path} is not UTF-8 at byte {error.start:,}") from error
