"""What a job's answer is: what a synchronous request with its body would have been answered."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Sequence

import orjson

from predictor.errors import QueueFull
from predictor.jobs.store import Progress
from predictor.jobs.submission import FORMATS
from predictor.protocols.wire import Limits
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion

# The server that accepted a job has checked it by its own settings.
_ACCEPTED = Limits(max_instances=sys.maxsize, max_timeout_s=math.inf)

# Between attempts where the engine's queue is full: doubled up to the second.
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


async def answer(
    model: LanguageModel,
    progress: Progress,
    timeout_s: float,
    count: Callable[[str, Sequence[Sequence[Completion]]], None],
) -> str:
    """The body of the synchronous answer, JSON; raises what the model raises, but waits where its queue is full.

    `timeout_s` is for a job that brings no timeout of its own. Counts `progress` up, and tells `count` of the end.
    """
    job = progress.job
    exchange = FORMATS[job.form].parse(json.loads(job.body), _ACCEPTED)
    progress.of = await model.check(exchange.requests)

    def on_token() -> None:
        progress.tokens += 1

    pause_s = _PAUSE_S
    while True:
        try:
            completions = await model.generate(exchange.requests, timeout_s, on_token)
            break
        except QueueFull:  # synchronous requests have filled it; a job has time
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    count(job.model, completions)
    return await asyncio.to_thread(lambda: orjson.dumps(exchange.render(completions)).decode())
