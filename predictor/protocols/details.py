"""What the answers of V1, V2 and generate tell of a completion beside its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from predictor.text.request import Completion, LogProb
from predictor.text.stream import TextStream


def facts(source: Completion | TextStream) -> dict[str, Any]:
    """Its counts, its seed, and the width it was computed with; of a stream as far as it has come."""
    return {
        "prompt_tokens": source.prompt_tokens,
        "completion_tokens": source.completion_tokens,
        "seed": source.seed,
        "dtype": source.dtype,
    }


def logprob_columns(chosen: Sequence[LogProb], alternatives: Sequence[Sequence[LogProb]]) -> dict[str, Any]:
    """A column per fact, as long as `chosen`; two tokens of broken bytes may read the same, so ids are told too."""
    return {
        "token_ids": [each.token_id for each in chosen],
        "tokens": [each.token for each in chosen],
        "token_logprobs": [each.logprob for each in chosen],
        "top_logprobs": [
            [{"token_id": each.token_id, "token": each.token, "logprob": each.logprob} for each in place]
            for place in alternatives
        ],
    }
