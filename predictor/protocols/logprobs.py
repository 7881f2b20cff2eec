"""Log-probabilities as the answers of V1, V2 and generate tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from predictor.text.request import LogProb


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
