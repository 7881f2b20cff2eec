"""Our engine over our forward: the default."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from predictor.backends.base import BackendOptions, Progress
from predictor.backends.device import choose_device, choose_width
from predictor.checkpoints.load import free_bytes, gib, load_compiled, load_model, read_config, why_not_compiled
from predictor.checkpoints.tokenizer import load_tokenizer
from predictor.engine.cuda import CUDAForward
from predictor.engine.draft import Draft
from predictor.engine.engine import Engine
from predictor.engine.load import Load
from predictor.engine.params import SamplingParams, Token
from predictor.engine.runner import Forward, GPT2Forward
from predictor.engine.sequence import new_request
from predictor.engine.stream import TokenStream
from predictor.engine.worker import EngineWorker
from predictor.errors import CheckpointError, ConfigurationError, NotEnoughMemory
from predictor.model.config import GPT2Config, Width, parse_config
from predictor.model.cpu.gpt2 import CPUGPT2
from predictor.model.cpu.library import TOKENS_PER_BLOCK, WIDTHS
from predictor.model.cpu.threads import default_threads
from predictor.model.gpt2 import GPT2

logger = logging.getLogger(__name__)

# KV memory where none is asked for: on CPU a machine is shared with other processes, so a fixed budget, which holds
# 29,000 tokens of the 124M model or 3,500 of the 1.5B in fp32; on a GPU most of what the weights leave.
_CPU_KV_BYTES = 2 * 2**30
_CUDA_KV_SHARE = 0.9

# The draft's width: the fastest. What it says is only a guess.
_DRAFT_WIDTH: Width = "int8"

# Each step leaves the draft a token or two of each sequence to catch up on; what it has missed must still shrink.
_LEAST_DRAFT_CHUNK = 64


class WorkerBackend:
    """What backends that run our engine share: everything but the forward pass."""

    def __init__(self, options: BackendOptions, config_vocabulary: int, context: int) -> None:
        self.tokenizer = load_tokenizer(options.folder, config_vocabulary)
        self.context, self.vocabulary = context, config_vocabulary
        self._options = options

    def _start(self, forward: Forward, draft: Draft | None = None) -> None:
        options = self._options
        engine = Engine(
            forward,
            context=self.context,
            max_running=options.max_running,
            chunk_tokens=options.prefill_chunk_tokens,
            step_tokens=options.step_tokens,
            speculation=options.speculation,
            draft=draft,
        )
        _warm_up(engine)
        self._worker = EngineWorker(engine, options.queue_limit)

    def check(self, params: SamplingParams) -> None:
        """Everything is honoured."""

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenStream]]:
        return self._worker.submit(requests)

    @property
    def load(self) -> Load:
        return self._worker.load

    @property
    def healthy(self) -> bool:
        return self._worker.healthy

    def stop(self) -> None:
        self._worker.stop()

    def join(self, timeout_s: float) -> None:
        self._worker.join(timeout_s)


class EngineBackend(WorkerBackend):
    def __init__(self, options: BackendOptions, progress: Progress, stop: threading.Event) -> None:
        config = parse_config(read_config(options.folder))
        super().__init__(options, config.vocabulary, config.context)
        device = choose_device(options.device)
        width = choose_width(options.dtype, device)
        draft_config = None if options.draft is None else _draft_config(options.draft, config, width, device)
        # A sequence has the same slots in the draft's memory as in the model's.
        per_token = _kv_bytes_per_token(config, width)
        if draft_config is not None:
            per_token += _kv_bytes_per_token(draft_config, _DRAFT_WIDTH)
        asked = None if options.kv_memory_mib is None else options.kv_memory_mib // options.sharing
        # In whole blocks of the kernels: a context that ends within one occupies all of it.
        least = per_token * -(-config.context // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
        if asked is not None and asked * 2**20 < least:
            raise ConfigurationError(
                f"--kv-memory-mib {options.kv_memory_mib}{_of_each(options)} holds {asked * 2**20 // per_token} tokens "
                f"and one full context is {config.context}: give at least {-(-least // 2**20) * options.sharing}"
            )
        needed = least if asked is None else asked * 2**20
        threads = options.threads or default_threads()
        drafted = 0 if draft_config is None else draft_config.parameters
        total = drafted + config.parameters
        draft = None
        if options.draft is not None:  # before the model, whose memory check then finds its memory taken
            with _naming_the_draft():
                draft = load_compiled(
                    options.draft,
                    _DRAFT_WIDTH,
                    threads=threads,
                    progress=lambda done, _: progress(done, total),
                    stop=stop,
                )
        model = load_model(
            options.folder,
            width,
            device,
            threads=threads,
            kv_bytes=needed,
            progress=lambda done, _: progress(drafted + done, total),
            stop=stop,
        )
        if isinstance(model, CPUGPT2):
            # torch is left with the odd small operation, for which threads would only be in the way of the kernels'.
            torch.set_num_threads(1)
            logger.info("CPU kernels: %s, %d threads", model.instruction_set, threads)
        kv_bytes = asked * 2**20 if asked is not None else _default_kv_bytes(least, device, options)
        slots = kv_bytes // per_token
        logger.info("KV memory: %s, %d tokens", gib(slots * per_token), slots)
        self.dtype, self.device = str(width), str(device)
        if isinstance(model, GPT2) and model.kernels is not None:
            self._start(CUDAForward(model, slots, options.max_running))
        else:
            self._start(GPT2Forward(model, slots), None if draft is None else _new_draft(draft, slots, options))


def _kv_bytes_per_token(config: GPT2Config, width: Width) -> int:
    """Keys and values are as wide as the activations they are made from."""
    return config.kv_bytes_per_token(4 if width == "float32" else 2)


def _draft_config(folder: Path, config: GPT2Config, width: Width, device: torch.device) -> GPT2Config:
    """The draft's configuration; raises `ConfigurationError` where it cannot guess for the model."""
    if device.type != "cpu":
        raise ConfigurationError(f"--draft is for the CPU, and {device} would serve: add --device cpu, or leave it out")
    if width not in WIDTHS:
        raise ConfigurationError(
            f"--draft needs the CPU kernels, and they do not compute {width}: use --dtype float32, bfloat16 or int8, "
            "or leave it out"
        )
    lacking = why_not_compiled(config, width)
    if lacking is not None:
        # In torch a row's bits depend on the rows beside it, and so would the text on the guesses.
        raise ConfigurationError(f"--draft needs the CPU kernels; leave it out: {lacking}")
    with _naming_the_draft():
        draft = parse_config(read_config(folder))
    lacking = why_not_compiled(draft, _DRAFT_WIDTH)
    if lacking is not None:
        raise ConfigurationError(f"--draft {folder} cannot run on the CPU kernels; choose another: {lacking}")
    if draft.vocabulary != config.vocabulary:
        raise ConfigurationError(
            f"--draft {folder} has a vocabulary of {draft.vocabulary} tokens and the model one of {config.vocabulary}: "
            "choose a draft of the model's own family"
        )
    if draft.context < config.context:
        raise ConfigurationError(
            f"--draft {folder} has a context of {draft.context} tokens and the model one of {config.context}: choose a "
            "draft whose context is as long"
        )
    return draft


@contextlib.contextmanager
def _naming_the_draft() -> Iterator[None]:
    """Say of a checkpoint's fault that it is the draft's."""
    try:
        yield
    except CheckpointError as error:
        advice = "; a smaller draft needs less, and none nothing" if isinstance(error, NotEnoughMemory) else ""
        raise type(error)(f"--draft: {error}{advice}") from error


def _new_draft(model: CPUGPT2, slots: int, options: BackendOptions) -> Draft:
    forward = GPT2Forward(model, slots)
    with _naming_the_draft():
        _warm_up(Engine(forward, context=model.config.context, max_running=1, chunk_tokens=1, step_tokens=1))
    logger.info("a draft guesses ahead: %d layers of %d in %s", model.config.layers, model.config.width, model.width)
    return Draft(forward, max(options.prefill_chunk_tokens, _LEAST_DRAFT_CHUNK))


def _warm_up(engine: Engine) -> None:
    """Generate two tokens before anybody waits for them: kernels are made, and a model that computes NaN is refused."""
    arrived: list[Token | Exception] = []
    engine.add(new_request([0], SamplingParams(max_new_tokens=2, temperature=0.0), [arrived.append]))
    while engine.step():
        pass
    if isinstance(arrived[-1], Exception):
        raise CheckpointError(f"{arrived[-1]}")


def _of_each(options: BackendOptions) -> str:
    return "" if options.sharing == 1 else f", shared by {options.sharing} models,"


def _default_kv_bytes(least: int, device: torch.device, options: BackendOptions) -> int:
    """Never more than the running sequences can use, never less than the `least` bytes of one full context."""
    most = options.max_running * least
    free = free_bytes(device)
    if device.type == "cuda" and options.sharing > 1:
        # What is free now is also meant for the weights of the models that come after.
        raise ConfigurationError(f"--kv-memory-mib is needed where {options.sharing} models share a GPU")
    budget = int(free * _CUDA_KV_SHARE) if device.type == "cuda" else min(_CPU_KV_BYTES, free // 2) // options.sharing
    return max(least, min(budget, most))
