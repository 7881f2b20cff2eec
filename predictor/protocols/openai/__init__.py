"""OpenAI's completions: `{"model", "prompt", ...}` -> `{"id", "object": "text_completion", "choices", "usage", ...}`.

Source: OpenAI's API reference; the tests' oracle is its client. Where the reference leaves a choice, this is ours:

- `text_offset` counts from 0, the first character of the choice's own `text` (of the prompt where that is echoed). The
  tokens of a stop string were generated and are listed; they begin where the text ends or later.
  So is the end token where one was drawn, last; it is no part of the text, and `usage` does not count it.
- `top_logprobs` holds the likeliest tokens and the one that came. Keys are texts: of tokens that read the same, such as
  parts of characters, the likeliest is told.
- `best_of` returns the candidates with the highest sum of their tokens' log-probabilities, and `usage` counts them all.
- `system_fingerprint` is the width of the model's weights.
"""

from __future__ import annotations

from predictor.protocols.openai.body import named_model, parse, refuse_chat
from predictor.protocols.openai.errors import error_body
from predictor.protocols.wire import WireFormat

COMPLETIONS = WireFormat("openai", parse, error=error_body, model=named_model)
CHAT = WireFormat("openai-chat", refuse_chat, error=error_body, model=named_model)
