"""Our engine over our forward: the default."""

from __future__ import annotations

import logging
import threading

import torch

from predictor.backends.base import BackendOptions, Progress
from predictor.backends.device import choose_device, choose_dtype
from predictor.checkpoints.load import free_bytes, gib, load_gpt2, read_config
from predictor.checkpoints.tokenizer import load_tokenizer
from predictor.engine.engine import Engine
from predictor.engine.load import Load
from predictor.engine.params import SamplingParams, Token
from predictor.engine.runner import Forward, GPT2Forward
from predictor.engine.sequence import new_request
from predictor.engine.stream import TokenStream
from predictor.engine.worker import EngineWorker
from predictor.errors import CheckpointError, ConfigurationError
from predictor.model.config import GPT2Config, parse_config

logger = logging.getLogger(__name__)

# KV memory where none is asked for: on CPU a machine is shared with other processes, so a fixed budget, which holds
# 29,000 tokens of the 124M model or 3,500 of the 1.5B in fp32; on a GPU most of what the weights leave.
_CPU_KV_BYTES = 2 * 2**30
_CUDA_KV_SHARE = 0.9


class WorkerBackend:
    """What backends that run our engine share: everything but the forward pass."""

    def __init__(self, options: BackendOptions, config_vocabulary: int, context: int) -> None:
        self.tokenizer = load_tokenizer(options.folder, config_vocabulary)
        self.context, self.vocabulary = context, config_vocabulary
        self._options = options

    def _start(self, forward: Forward) -> None:
        options = self._options
        engine = Engine(
            forward,
            context=self.context,
            max_running=options.max_running,
            chunk_tokens=options.prefill_chunk_tokens,
            step_tokens=options.step_tokens,
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
        dtype = choose_dtype(options.dtype, device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        per_token = config.kv_bytes_per_token(dtype.itemsize)
        asked = options.kv_memory_mib
        least = per_token * config.context
        if asked is not None and asked * 2**20 < least:
            raise ConfigurationError(
                f"--kv-memory-mib {asked} holds {asked * 2**20 // per_token} tokens and one full context is "
                f"{config.context}: give at least {-(-least // 2**20)}"
            )
        needed = least if asked is None else asked * 2**20
        model = load_gpt2(options.folder, dtype, device, kv_bytes=needed, progress=progress, stop=stop)
        kv_bytes = asked * 2**20 if asked is not None else _default_kv_bytes(config, device, per_token, options)
        slots = kv_bytes // per_token
        logger.info("KV memory: %s, %d tokens", gib(slots * per_token), slots)
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        self._start(GPT2Forward(model, slots))


def _warm_up(engine: Engine) -> None:
    """Generate two tokens before anybody waits for them: kernels are made, and a model that computes NaN is refused."""
    arrived: list[Token | Exception] = []
    engine.add(new_request([0], SamplingParams(max_new_tokens=2, temperature=0.0), [arrived.append]))
    while engine.step():
        pass
    if isinstance(arrived[-1], Exception):
        raise CheckpointError(f"{arrived[-1]}")


def _default_kv_bytes(config: GPT2Config, device: torch.device, per_token: int, options: BackendOptions) -> int:
    """Never more than the running sequences can use, never less than one full context."""
    most, least = options.max_running * config.context * per_token, config.context * per_token
    free = free_bytes(device)
    budget = int(free * _CUDA_KV_SHARE) if device.type == "cuda" else min(_CPU_KV_BYTES, free // 2)
    return max(least, min(budget, most))
