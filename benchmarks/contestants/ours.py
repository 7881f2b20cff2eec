"""This project's engine, asked as the server asks it for a whole answer: streams from the engine's thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contestants.engine import Sizes
from predictor.backends.base import Backend, BackendOptions
from predictor.backends.engine import EngineBackend
from predictor.engine.params import SamplingParams
from predictor.engine.stream import TokenStream

PACKAGES = ("gpt2-predictor", "torch")


class Ours:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._loop = asyncio.new_event_loop()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return self._loop.run_until_complete(self._generate(prompts, new_tokens))

    async def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, in_lots=True)
        submitted = self._backend.submit([(prompt_ids, params) for prompt_ids in prompts])
        return await asyncio.gather(*(_ids(stream) for (stream,) in submitted))


async def _ids(stream: TokenStream) -> list[int]:
    return [token.id async for token in stream]


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> Ours:
    config = json.loads((model / "config.json").read_text())
    # 2 (K, V) * layers * width * 4 B: enough for any width of keys and values; unused pages are never touched.
    bytes_per_token = 2 * config["n_layer"] * config["n_embd"] * 4
    needed_bytes = max(sizes.most_tokens, config["n_positions"]) * bytes_per_token
    options = BackendOptions(
        folder=model,
        threads=sizes.threads,
        kv_memory_mib=-(-needed_bytes // 2**20),
        max_running=64,
        speculation=False,
        **settings,
    )
    return Ours(EngineBackend(options, lambda done, total: None, threading.Event()))
