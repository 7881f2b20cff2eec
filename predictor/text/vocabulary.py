"""What each token is, in bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """A tokenizer seen as a table: id -> bytes of text. Special tokens are no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Those with a role (bos, eos, ...), and those the file only calls special.
        unnamed = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(unnamed.union(tokenizer.all_special_ids))
        self.end_token: int | None = tokenizer.eos_token_id
        self.byte_level = _is_byte_level(tokenizer)

    def prepare(self) -> None:
        """Make the tables now, where nobody waits: they take 0.2 s for GPT-2's 50,257 tokens."""
        if self.byte_level:
            _ = self.longest_token, self.sorted_tokens, self.joined_tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it count as one token, none are added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; empty for special tokens. Byte-level tokenizers only."""
        byte_of = {character: value for value, character in _byte_alphabet().items()}
        added = self.tokenizer.get_added_vocab()
        table = [b""] * len(self.tokenizer)
        for token, token_id in self.tokenizer.get_vocab().items():
            if token_id in self.special_ids:
                continue
            in_alphabet = token not in added and all(character in byte_of for character in token)
            table[token_id] = bytes(byte_of[c] for c in token) if in_alphabet else token.encode()
        return table

    @cached_property
    def sorted_tokens(self) -> list[tuple[bytes, int]]:
        """(bytes, id) of every token that is text, in order of bytes."""
        return sorted((token, token_id) for token_id, token in enumerate(self.token_bytes) if token)

    @cached_property
    def joined_tokens(self) -> tuple[bytes, list[int]]:
        """All of `sorted_tokens` behind one another, 0xFF between (no UTF-8 text has it), and where each begins."""
        lengths = (len(token) + 1 for token, _ in self.sorted_tokens)
        return b"\xff".join(token for token, _ in self.sorted_tokens), [0, *accumulate(lengths)]

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token, where it is known; a text of more than context x this cannot fit."""
        return max(map(len, self.token_bytes), default=1) if self.byte_level else 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens together, special ones by their names: characters that they share are whole."""
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def known_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, for any row of the model: it may have more than its tokenizer has tokens (padding)."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token is of a text: none of it where it is special; None where that is not known."""
        if token_id in self.special_ids:
            return b""
        return self.known_bytes(token_id) if self.byte_level else None

    def show(self, token_id: int) -> str:
        """The token as a person reads it, by itself: U+FFFD for bytes that are no whole character."""
        if token_id in self.special_ids or not self.byte_level:
            return str(self.tokenizer.decode([token_id]))
        return self.known_bytes(token_id).decode(errors="replace")


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {value: chr(value) for value in printable}
    others = (value for value in range(256) if value not in table)
    return table | {value: chr(0x100 + place) for place, value in enumerate(others)}
