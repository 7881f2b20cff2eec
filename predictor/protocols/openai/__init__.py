"""OpenAI's completions and chats: `{"model", "prompt" or "messages", ...}` -> `{"id", "choices", "usage", ...}`.

Source: OpenAI's API reference; the tests' oracle is its client. Where the reference leaves a choice, this is ours:

- `text_offset` counts from 0, the first character of the choice's own `text` (of the prompt where that is echoed). The
  tokens of a stop string were generated and are listed; they begin where the text ends or later.
  So is the end token where one was drawn, last; it is no part of the text, and `usage` does not count it.
- `top_logprobs` holds the likeliest tokens and the one that came. Keys are texts: of tokens that read the same the
  likeliest is told. Parts of characters are told as `bytes:\\xe2\\x80`.
- `best_of` returns the candidates with the highest sum of their tokens' log-probabilities, and `usage` counts them all.
- `system_fingerprint` is the width of the model's weights.
- A chat is the completion of what the model's chat template makes of its messages; the parts of a content are joined by
  line breaks. Its `logprobs` are of the tokens generated for it, as completions' are, but without the end token.
"""

from __future__ import annotations

from predictor.protocols.openai.body import parse
from predictor.protocols.openai.chat_body import parse_chat
from predictor.protocols.openai.errors import error_body
from predictor.protocols.openai.fields import named_model
from predictor.protocols.wire import WireFormat

COMPLETIONS = WireFormat("openai", parse, error=error_body, model=named_model)
CHAT = WireFormat("openai-chat", parse_chat, error=error_body, model=named_model)
