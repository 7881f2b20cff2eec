"""`predictor generate`: one prompt through the language model, printed as it comes. Part of the command line."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

from predictor.backends.base import BackendOptions, open_backend
from predictor.errors import InvalidRequest
from predictor.protocols.parameters import parse_parameters
from predictor.settings import Settings
from predictor.text.language_model import LanguageModel

# A step of the largest model on the slowest device takes seconds.
_LAST_STEP_S = 30.0


async def stream_to_terminal(prompt: str, parameters: dict[str, Any], settings: Settings) -> None:
    """Print prompt and completion; several samples come one after the other, each under its seed."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("the prompt is not UTF-8") from error
    checked = parse_parameters(parameters, "generate", settings.timeout_s)
    options = BackendOptions.from_settings(settings)
    with tqdm(desc="loading", unit=" parameters", unit_scale=True, leave=False, file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        backend = open_backend(settings.backend, options, progress, threading.Event())
    try:
        (streams,) = await LanguageModel(backend).submit([checked.request(prompt, "prompt")])
        for stream in streams:
            if len(streams) > 1:
                print(f"--- seed {stream.seed}")
            print(prompt, end="", flush=True)
            async for delta in stream:
                print(delta.text, end="", flush=True)
            print()
    finally:
        backend.stop()
        backend.join(_LAST_STEP_S)
