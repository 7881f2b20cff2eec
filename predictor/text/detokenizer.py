"""Token ids into text as they come. A character whose bytes are split over tokens waits until it is whole."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from predictor.text.vocabulary import Vocabulary

# Prompt tokens that the window detokenizer begins with: enough for any spacing rule.
_NEIGHBOURS = 6


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""


def new_detokenizer(vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> Detokenizer:
    """A detokenizer for what follows `prompt_ids`."""
    return _Bytes(vocabulary) if vocabulary.byte_level else _Window(vocabulary, prompt_ids)


def text_offsets(vocabulary: Vocabulary, token_ids: Sequence[int]) -> list[int]:
    """Where each token begins in the text of all of them, special ones by their names: characters whole before it."""
    detokenizer, offset, offsets = new_detokenizer(vocabulary), 0, []
    for token_id in token_ids:
        offsets.append(offset)
        special = token_id in vocabulary.special_ids
        offset += len(vocabulary.show(token_id) if special else detokenizer.push(token_id))
    return offsets


class _Bytes:
    """Byte-level BPE: tokens are bytes, and Python's incremental decoder knows which are whole characters.

    Bytes that can be no character become U+FFFD, as in the tokenizer's own decode. A character that the end of the
    completion cuts in two is left out.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._vocabulary.known_bytes(token_id))


class _Window:
    """Any other tokenizer: decode the last few tokens twice, with and without the newest; the difference is new.

    The window begins at a token whose text is already out, so that spacing rules see a neighbour.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._window = list(prompt_ids[-_NEIGHBOURS:])
        self._known = len(self._window)  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._decode(self._window[: self._known])
        after = self._decode(self._window)
        if after.endswith("�") or len(after) <= len(before):
            return ""
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
