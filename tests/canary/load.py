"""An open-loop load: requests leave at their times, whether or not the ones before were answered.

Each outcome is kept, so that a test can say of every request that was sent what became of it. Times are
`time.monotonic()` of this process, as are those of the controller's stub.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from tests.canary.revisions import MODEL

# Prompts of a few tokens, of the plays that the bundled model knows.
_PROMPTS = ("To be", "My lord", "What says he", "O Romeo", "First Citizen:", "Good night")


@dataclass(frozen=True, slots=True)
class Question:
    """One request: the same prompt `prompts` times, `samples` of each, all of `tokens` new tokens."""

    prompt: str
    tokens: int
    seed: int
    prompts: int = 1
    samples: int = 1

    @property
    def body(self) -> dict[str, Any]:
        parameters = {"max_new_tokens": self.tokens, "n": self.samples, "seed": self.seed}
        instances = [self.prompt] * self.prompts
        return {"instances": instances, "parameters": parameters | {"ignore_eos": True, "details": True}}

    def answered_by(self, answer: Any) -> bool:
        """Whether a body is the whole answer: every sample of every prompt with all its tokens."""
        predictions = answer.get("predictions", []) if isinstance(answer, dict) else []
        samples = [one for each in predictions for one in (each if isinstance(each, list) else [each])]
        complete = [one for one in samples if one["completion_tokens"] == self.tokens]
        return len(samples) == len(complete) == self.prompts * self.samples


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    sent_s: float
    seconds: float  # to the whole body
    status: int  # 0: no answer; `error` says why
    revision: str  # that Envoy had it served by; "" if it says none
    whole: bool
    error: str = ""

    @property
    def good(self) -> bool:
        return self.status == 200 and self.whole

    @property
    def answered_s(self) -> float:
        return self.sent_s + self.seconds

    def moved(self, by_s: float) -> Outcome:
        """The same on another clock."""
        return replace(self, sent_s=self.sent_s + by_s)


class Load:
    """Requests at `rate` per second while the block lasts, with exponential gaps; it ends with the last answer.

    Each is for one of `lengths` new tokens. The gaps, prompts, lengths and seeds follow from `seed`.
    """

    def __init__(
        self, url: str, rate: float, lengths: tuple[int, ...] = (8, 16, 32), seed: int = 0, timeout_s: float = 60
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.sent = 0
        self._url = f"{url}/v1/models/{MODEL}:predict"
        self._rate = rate
        self._lengths = lengths
        self._chosen = random.Random(seed)
        self._timeout_s = timeout_s
        self._extra: list[Question] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(self._timeout_s + 10)
        assert not self._thread.is_alive(), f"{self.sent - len(self.outcomes)} requests have no end"

    def also(self, question: Question) -> None:
        """Send this one too, with the next of the others."""
        self._extra.append(question)

    async def _run(self) -> None:
        due = time.monotonic()
        # A limit of connections would make the load closed-loop once the servers are slow.
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        running: set[asyncio.Task[None]] = set()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while not self._stopping.is_set():
                # No rush of requests after a pause of the machine: what was due more than a second ago is let go.
                due = max(due, time.monotonic() - 1) + self._chosen.expovariate(self._rate)
                if (wait_s := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                questions = [self._next()]
                while self._extra:
                    questions.append(self._extra.pop())
                for question in questions:
                    self.sent += 1
                    task = asyncio.create_task(self._ask(session, question))
                    running.add(task)
                    task.add_done_callback(running.discard)
            if running:
                await asyncio.wait(running)

    def _next(self) -> Question:
        return Question(self._chosen.choice(_PROMPTS), self._chosen.choice(self._lengths), self._chosen.getrandbits(32))

    async def _ask(self, session: aiohttp.ClientSession, question: Question) -> None:
        began = time.monotonic()
        status, revision, whole, error = 0, "", False, ""
        try:
            async with session.post(self._url, json=question.body) as response:
                status, revision = response.status, response.headers.get("x-served-by", "")
                text = await response.text()
                if status == 200:
                    whole = question.answered_by(await response.json())
                else:
                    error = text
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.outcomes.append(Outcome(began, time.monotonic() - began, status, revision, whole, error))


def told(outcomes: list[Outcome]) -> str:
    """How many were not good and in which ways, for people."""
    kinds = Counter((each.revision[-5:], each.status, each.error[:100]) for each in outcomes if not each.good)
    return f"{len(outcomes)} answers, {sum(kinds.values())} of them not good {dict(kinds) or ''}"
