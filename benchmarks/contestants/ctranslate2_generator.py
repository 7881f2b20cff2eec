"""CTranslate2's Generator: the whole batch at once, the prompt in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ctranslate2

from benchmarks.contestants.engine import Sizes

PACKAGES = ("ctranslate2",)


class CTranslate2:
    def __init__(self, generator: ctranslate2.Generator, vocabulary: list[str]) -> None:
        self._generator, self._vocabulary = generator, vocabulary

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = self._generator.generate_batch(
            [[self._vocabulary[token_id] for token_id in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,  # which also keeps the end token out
            include_prompt_in_result=False,  # True would feed the prompt token by token
        )
        return [result.sequences_ids[0] for result in results]


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> CTranslate2:
    generator = ctranslate2.Generator(str(model), intra_threads=sizes.threads, inter_threads=1)
    return CTranslate2(generator, json.loads((model / "vocabulary.json").read_text()))


def convert(checkpoint: Path, out: Path, conversion: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(out), quantization=conversion, force=True)
