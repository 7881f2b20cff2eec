"""The engine's thread, and the async iterators that face it.

One inbox into the thread; back, at most one `call_soon_threadsafe` per step and event loop. The event loop never waits
for a step, and the engine never waits for the event loop.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from predictor.engine.engine import Engine
from predictor.engine.load import Load
from predictor.engine.params import SamplingParams
from predictor.engine.sequence import Request, Sequence, new_request
from predictor.engine.stream import Outbox, TokenStream
from predictor.errors import EngineFailed, NotReady, QueueFull

logger = logging.getLogger(__name__)

# A step of the largest model on the slowest device served takes seconds; past this the engine counts as stuck.
_STALL_S = 120.0


class EngineWorker:
    """Owns the thread. All methods but `_run` and its helpers are for the event loop's side."""

    def __init__(self, engine: Engine, queue_limit: int) -> None:
        self._engine = engine
        self._queue_limit = queue_limit
        self._inbox: queue.SimpleQueue[Request | Sequence | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._requests_in_inbox = 0
        self._outbox = Outbox()
        self._load = engine.load
        self._heartbeat = time.monotonic()
        self._busy = False
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenStream]]:
        """Queue prompts, all or none; one stream per prompt and sample.

        Raises `QueueFull` when the requests would wait beyond the queue's limit, `NotReady` when stopping.
        """
        if self._stopping or not self.healthy:
            raise NotReady("the server is shutting down" if self._stopping else "the engine has failed")
        with self._lock:
            load = self._load
            waiting = load.waiting_requests + self._requests_in_inbox
            # What is on its way to a free seat is not waiting; a request on its own is never too many.
            room = self._queue_limit + (0 if load.waiting_requests else load.free_seats)
            if waiting and waiting + len(requests) > room:
                raise QueueFull(
                    f"the queue is full: {waiting} prompts wait, {len(requests)} more would be past its limit of "
                    f"{self._queue_limit}"
                )
            self._requests_in_inbox += len(requests)
        return [self._submit(prompt_ids, params) for prompt_ids, params in requests]

    def _submit(self, prompt_ids: list[int], params: SamplingParams) -> list[TokenStream]:
        sequences: list[Sequence] = []  # filled below; the streams' close looks them up by place
        streams = [TokenStream(self._closer(sequences, k)) for k in range(params.n)]
        request = new_request(prompt_ids, params, [self._outbox.sink(stream, params.in_lots) for stream in streams])
        sequences += [request.leader, *request.pending]
        self._inbox.put(request)
        return streams

    def _closer(self, sequences: list[Sequence], k: int) -> Callable[[], None]:
        return lambda: self._inbox.put(sequences[k])

    @property
    def load(self) -> Load:
        load = self._load
        return replace(load, waiting_requests=load.waiting_requests + self._requests_in_inbox)

    @property
    def healthy(self) -> bool:
        """The thread lives, no step has hung, and no device fault has stuck."""
        stalled = self._busy and time.monotonic() - self._heartbeat > _STALL_S
        return self._thread.is_alive() and not stalled and not self._failed

    def stop(self) -> None:
        """End everything with 503 after the step that runs, and end the thread. Idempotent."""
        self._stopping = True
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            self._take_inbox(wait=not self._busy)
            self._heartbeat, self._busy = time.monotonic(), True
            try:
                self._busy = self._engine.step()
            except Exception as error:  # the one place where the engine meets its callers
                logger.exception("a step failed; its requests end with an error")
                # CUDA errors stick to the process: nothing after them can be trusted.
                self._failed = self._failed or "CUDA error" in str(error)
                self._engine.end_all(lambda: EngineFailed("the engine failed; the server's log has more"))
            self._load = self._engine.load
            self._outbox.flush()
        self._take_inbox(wait=False)
        self._engine.end_all(lambda: NotReady("the server is shutting down; send the request again"))
        self._load = self._engine.load
        self._outbox.flush()

    def _take_inbox(self, wait: bool) -> None:
        """Apply what came in; with `wait`, sleep until something does."""
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(item, Request):
                with self._lock:
                    self._engine.add(item)
                    self._requests_in_inbox -= 1
                    self._load = self._engine.load
            elif isinstance(item, Sequence):
                self._engine.end(item)
