"""The scheduler's own time: its part of a step around a runner that computes nothing, in this process."""

from __future__ import annotations

import time

from predictor.engine.cache import SlotAllocator
from predictor.engine.params import Sampled, SamplingParams, Token
from predictor.engine.scheduler import Scheduler
from predictor.engine.sequence import Request, new_request

_PROMPT, _NEW_TOKENS = 16, 48
_WARM_UP = 200
_LIMITS = {"chunk_tokens": 128, "step_tokens": 256}  # those of `serve`


def time_steps(sequences: int, steps: int) -> list[float]:
    """Seconds of each of `steps`, with as many sequences, which end and are replaced: each has 48 new tokens."""
    slots = SlotAllocator(2 * sequences * (_PROMPT + _NEW_TOKENS), multiple=16)
    scheduler = Scheduler(slots, max_running=sequences, **_LIMITS)
    ended = 0

    def sink(item: Token | Exception) -> None:
        nonlocal ended
        ended += isinstance(item, Token) and item.finish_reason is not None

    def request(new_tokens: int) -> Request:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        return new_request(list(range(_PROMPT)), params, [sink])

    for number in range(sequences):  # so that they end one after the other, not all in one step
        scheduler.add(request(1 + number * _NEW_TOKENS // sequences))
    times_s = []
    for _ in range(_WARM_UP + steps):
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter()
        sampled = [Sampled(7)] * len(batch.sampling)
        computed = time.perf_counter()
        scheduler.advance(batch)
        scheduler.commit(batch, sampled)
        times_s.append(scheduled - began + time.perf_counter() - computed)
        for _ in range(ended):
            scheduler.add(request(_NEW_TOKENS))
        ended = 0
    return times_s[_WARM_UP:]
