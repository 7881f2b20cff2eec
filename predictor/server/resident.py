"""A model's way into memory and out of it, behind KServe's lifecycle."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import kserve

from predictor.backends.base import BackendOptions, open_backend
from predictor.errors import LoadCancelled, NotFound, NotReady
from predictor.protocols.models import State
from predictor.server.body import unless
from predictor.server.gauges import unwatch, watch
from predictor.server.progress import LogProgress
from predictor.settings import NamedModel, Settings, knative_revision
from predictor.text.chat import read_template
from predictor.text.language_model import LanguageModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long a stop waits for a load that cannot be interrupted (transformers and aitextgen load in one call).
_ABANDON_LOAD_S = 2.0

# A step of the largest model on the slowest device takes seconds.
LAST_STEP_S = 10.0

_SHUTTING_DOWN = "the server is shutting down; send the request again"


class Resident(kserve.Model):  # type: ignore[misc]  # kserve ships no types
    """A model that is loaded in a thread of its own, may be unloaded and loaded again, and ends without losing work."""

    def __init__(self, settings: Settings, model: NamedModel, turn: asyncio.Lock | None = None) -> None:
        """`turn` is shared by models that are to load one after the other: two at once would need more memory."""
        super().__init__(model.name)
        self.settings = settings
        self._source = model
        self._turn = turn or asyncio.Lock()
        self.labels = (self.name, knative_revision())  # of its metrics
        # KServe registers, at start, only what says it is ready; our honest answer is `healthy` (KSERVE.md, 6).
        self.ready = True
        self.engine = True
        self.state: State = "LOADING"
        self._language_model: LanguageModel | None = None
        self.load_abandoned = False  # a stop came while a load ran that cannot be interrupted
        self._stopping = threading.Event()
        self._cancel_load = threading.Event()  # of the load that runs
        self._change = asyncio.Lock()  # of `state`: loads and unloads come one after the other
        self._optional = False  # the admin has unloaded it once

    def start(self) -> None:
        """KServe calls this before the event loop runs: nothing to do yet."""

    async def start_engine(self) -> None:
        """Load, unless it is loaded, in a thread of its own while the server answers; raises what the load raised.

        A stop and an unload end it early, and it then says nothing.
        """
        async with self._change:
            if self._loaded:
                return
            self.state, self._cancel_load = "LOADING", threading.Event()
            try:
                async with self._turn:
                    if not self._stopping.is_set():
                        await self._load_in_thread()
            finally:
                if not self._loaded and not self._stopping.is_set():
                    await asyncio.to_thread(self._let_go)
                    self.state = "END"

    async def unload(self) -> None:
        """Refuse new requests, finish what runs within the grace period, end the rest, give the memory back.

        A load that runs is ended first.
        """
        self._optional = True
        self._cancel_load.set()
        async with self._change:
            if not self._loaded:
                return
            self.state = "UNLOADING"
            try:
                await self._until_idle(self.settings.grace_period_s)
            finally:
                await asyncio.to_thread(self._let_go)
                self.state = "END"
            logger.info("%s is unloaded", self.name)

    async def _until_idle(self, limit_s: float) -> None:
        assert self._language_model is not None
        backend, end = self._language_model.backend, time.monotonic() + limit_s
        while time.monotonic() < end:
            load = backend.load
            if not load.running_requests and not load.waiting_requests:
                return
            await asyncio.sleep(0.05)

    def _let_go(self) -> None:
        if self._language_model is None:  # a load that failed: its process should end before torch is imported
            return
        from predictor.backends.memory import give_back

        backend = self._language_model.backend
        backend.stop()
        backend.join(LAST_STEP_S)
        unwatch(self.labels, backend, self.settings.backend)
        self._language_model = None
        del backend
        give_back()

    async def _load_in_thread(self) -> None:
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()

        def load() -> None:
            try:
                self.load()
                outcome: BaseException | None = None
            except BaseException as error:  # handed to the event loop, whatever it is
                outcome = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, loaded, outcome)

        # A daemon, so that a load which cannot be interrupted does not hold the process.
        threading.Thread(target=load, name=f"load-{self.name}", daemon=True).start()
        stopped = asyncio.create_task(self._wait_for_stop())
        try:
            await asyncio.wait({loaded, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not loaded.done():
                await asyncio.wait({loaded}, timeout=_ABANDON_LOAD_S)
            self.load_abandoned = not loaded.done()
            if loaded.done():
                loaded.result()
        except LoadCancelled:
            logger.info("stopped while loading")
        finally:
            stopped.cancel()
            loaded.cancel()

    async def _wait_for_stop(self) -> None:
        while not self._stopping.is_set():  # noqa: ASYNC110 - it is the loading thread's event, not the loop's
            await asyncio.sleep(0.05)

    def load(self) -> bool:
        """Find the checkpoint, load it, warm it up. Blocking; raises `PredictorError`."""
        settings = self.settings
        template = None if settings.chat_template is None else read_template(settings.chat_template)
        options = BackendOptions.from_settings(settings, self._source)
        cancel = self._cancel_load
        with LogProgress(f"loading {self.name}") as progress:
            backend = open_backend(settings.backend, options, progress, cancel)
        try:
            self._language_model = LanguageModel(backend, template)
        except BaseException:
            backend.stop()
            raise
        watch(self.labels, backend, settings.backend)
        if cancel.is_set():  # looked at after the assignment: a stop finds the model, or is found here
            backend.stop()
            raise LoadCancelled("told to stop while loading")
        self.state = "AVAILABLE"
        logger.info("%s is ready: %s, %s on %s", self.name, settings.backend, backend.dtype, backend.device)
        return True

    @property
    def _loaded(self) -> bool:
        return self.state == "AVAILABLE"

    @property
    def alive(self) -> bool:
        """False when only a restart can help: the engine's thread is gone or stuck, or the device has failed."""
        model = self._language_model
        return model is None or not self._loaded or model.backend.healthy

    @property
    def stopping(self) -> bool:
        """Told to end: what runs is finished, nothing new begins."""
        return self._stopping.is_set()

    @property
    def awaited(self) -> bool:
        """False while the server is ready without it: an admin has unloaded it, or is loading it again."""
        return self.stopping or self._loaded or not self._optional

    async def healthy(self) -> bool:
        """Loaded, able to answer, and not shutting down."""
        return self._loaded and not self.stopping and self.alive

    def language_model(self) -> LanguageModel:
        """The loaded model; raises `NotReady`, and `NotFound` for one that was unloaded."""
        if self._stopping.is_set():
            raise NotReady(_SHUTTING_DOWN)
        model = self._language_model
        if self._loaded and model is not None:
            return model
        if self.state == "END":
            raise NotFound(f"Servable not found for request: Latest({self.name}); it is not loaded")
        doing = "still loading" if self.state == "LOADING" else "being unloaded"
        raise NotReady(f"the model {self.name} is {doing}; try again")

    async def unless_stopping(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which is not yet a request, unless the server stops first; then `NotReady`."""
        return await unless(self._wait_for_stop(), NotReady(_SHUTTING_DOWN), work)

    def drain(self) -> None:
        """Refuse what comes from now on; what runs goes on, but a load."""
        self._stopping.set()
        self._cancel_load.set()

    def stop(self) -> None:
        """End what still runs, with an error that says so."""
        self.drain()
        if self._language_model is not None:
            self._language_model.backend.stop()

    def stop_engine(self) -> None:
        """KServe calls `stop` first; there is nothing more to end."""

    def join(self, timeout_s: float) -> None:
        """Wait for the backend's threads after `stop`."""
        if self._language_model is not None:
            self._language_model.backend.join(timeout_s)


def _settle(future: asyncio.Future[None], outcome: BaseException | None) -> None:
    if future.done():
        return
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
