"""The engine without a server, asked the same: a process of its own that sleeps while the server is measured.

Speaks JSON lines as benchmarks/contestants/worker.py does. Settings come from PREDICTOR_* variables, as the server's
do, and a request becomes what it becomes in the server: by the same parser and the same language model.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import platform
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.contestants.worker import private_stdout, resident_bytes
from benchmarks.serving.load import Reply, Run, Served, run_arrivals, run_clients
from benchmarks.serving.workload import Arrival, Ask
from predictor.backends.base import BackendOptions, open_backend
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.sequence import new_request
from predictor.engine.worker import EngineWorker
from predictor.protocols import v1
from predictor.settings import Settings, load_settings
from predictor.text.detokenizer import new_detokenizer
from predictor.text.language_model import LanguageModel

PACKAGES = ("gpt2-predictor", "torch", "transformers", "kserve", "fastapi", "uvicorn", "aiohttp")


class Alone:
    """Our engine, in two ways: by its thread and token streams, each token as it comes, and step by step."""

    def __init__(self, settings: Settings) -> None:
        options = BackendOptions.from_settings(settings)
        backend = open_backend("engine", options, lambda done, total: None, threading.Event())
        # Two threads must not step one engine: the backend's ends here, and each run has its own or none.
        backend.stop()
        backend.join(60.0)
        self._engine: Engine = backend._worker._engine  # type: ignore[attr-defined]
        self._queue_limit = options.queue_limit
        self._worker: EngineWorker | None = None
        self._language_model = LanguageModel(backend)
        self._limits = v1.Limits(settings.max_instances, settings.timeout_s)
        self._prepared: dict[Ask, tuple[list[int], SamplingParams]] = {}

    def streams(self, clients: Sequence[Sequence[Ask]]) -> Run:
        self._prepare(ask for asks in clients for ask in asks)
        with self._thread():
            run = asyncio.run(run_clients(self, clients))
        return self._as_text(run)

    def arrivals(self, arrivals: Sequence[Arrival]) -> Run:
        self._prepare(arrival.ask for arrival in arrivals)
        with self._thread():
            run = asyncio.run(run_arrivals(self, arrivals))
        return self._as_text(run)

    @contextmanager
    def _thread(self) -> Iterator[None]:
        self._worker = EngineWorker(self._engine, self._queue_limit)
        try:
            yield
        finally:
            self._worker.stop()
            self._worker.join(60.0)

    async def ask(self, ask: Ask) -> Reply:
        assert self._worker is not None
        ((stream,),) = self._worker.submit([self._prepared[ask]])
        ids = [(await stream.__anext__()).id]
        first = time.perf_counter()
        ids += [token.id async for token in stream]
        return Reply(ids, first)

    def steps(self, clients: Sequence[Sequence[Ask]]) -> Run:
        """`Engine.step` in a loop; a client's next request is there when the step that ended its last has run."""
        self._prepare(ask for asks in clients for ask in asks)
        engine, began = self._engine, time.perf_counter()
        rows = [_Row(list(asks)) for asks in clients]
        idle = rows
        while True:
            for row in idle:
                if row.left:
                    ask = row.begin()
                    engine.add(new_request(*self._prepared[ask], [row.sink]))
            if not engine.step():
                break
            idle = [row for row in rows if row.ended]
            for row in idle:
                row.close()
        run = Run(time.perf_counter() - began, [served for row in rows for served in row.served])
        return self._as_text(run)

    def _prepare(self, asks: Iterable[Ask]) -> None:
        self._prepared = {}
        for ask in asks:
            (row,) = v1.parse(json.loads(ask.body), self._limits).rows
            prepared = self._language_model.preparer.prepare(row.request)
            self._prepared[ask] = (prepared.prompt.ids, prepared.params)

    def _as_text(self, run: Run) -> Run:
        """The same run with texts for ids, so that it can be compared with the server's; not timed."""
        return Run(run.seconds, [self._text_of(each) for each in run.served])

    def _text_of(self, served: Served) -> Served:
        detokenizer = new_detokenizer(self._language_model.vocabulary, self._prepared[served.ask][0])
        text = "".join(detokenizer.push(token_id) for token_id in served.answer)
        return Served(served.ask, served.latency_s, served.first_token_s, text)


class _Row:
    """One client of the bare engine."""

    def __init__(self, left: list[Ask]) -> None:
        self.left = left[::-1]
        self.served: list[Served] = []
        self._ids: list[int] = []
        self._began = self._first = 0.0
        self.ended = False

    def begin(self) -> Ask:
        self._ids, self.ended, self._began = [], False, time.perf_counter()
        return self.left[-1]

    def sink(self, item: Token | Exception) -> None:
        if isinstance(item, Exception):
            raise item
        if not self._ids:
            self._first = time.perf_counter()
        self._ids.append(item.id)
        self.ended = item.finish_reason is not None

    def close(self) -> None:
        latency_s = time.perf_counter() - self._began
        self.served.append(Served(self.left.pop(), latency_s, self._first - self._began, self._ids))
        self.ended = False


def told(run: Run) -> dict[str, Any]:
    return {
        "seconds": run.seconds,
        "latencies_s": [each.latency_s for each in run.served],
        "first_tokens_s": [each.first_token_s for each in run.served],
        "answers": [each.answer for each in run.served],
    }


def answer(alone: Alone, request: dict[str, Any]) -> dict[str, Any]:
    if request["way"] == "arrivals":
        return told(alone.arrivals([Arrival(at_s, Ask(**ask)) for at_s, ask in request["arrivals"]]))
    clients = [[Ask(**ask) for ask in asks] for asks in request["clients"]]
    return told(alone.streams(clients) if request["way"] == "streams" else alone.steps(clients))


def main() -> None:
    out = private_stdout()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    began, imported_bytes = time.perf_counter(), resident_bytes()
    alone = Alone(load_settings({}))
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    times = {"import_s": 0.0, "load_s": time.perf_counter() - began}
    say({"ready": True, **times, "imported_bytes": imported_bytes, "versions": versions})
    for line in sys.stdin:
        try:
            say(answer(alone, json.loads(line)))
        except Exception as error:  # the reader decides
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
