"""OpenVINO GenAI: its stateful pipeline (one batch, one KV state), and its continuous-batching one (paged KV)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.contestants.engine import Engine, Sizes

PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "nncf")


def _greedy(new_tokens: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


class Stateful:
    def __init__(self, pipeline: openvino_genai.LLMPipeline) -> None:
        self._pipeline = pipeline

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(tokens) for tokens in self._pipeline.generate(inputs, _greedy(new_tokens)).tokens]


class Continuous:
    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline) -> None:
        self._pipeline = pipeline

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [_greedy(new_tokens)] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]


def _quantization_group(model: Path) -> int:
    """Activations that share a scale beside int8 weights: the largest divisor of the width up to 320 was fastest.

    256 for the 124M, 320 for the 1.5B; the default is 32. Without int8 weights it has no effect.
    """
    width = json.loads((model / "config.json").read_text())["n_embd"]
    return max(size for size in range(1, 321) if width % size == 0)


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> Engine:
    properties = {
        "INFERENCE_PRECISION_HINT": settings["math"],
        "INFERENCE_NUM_THREADS": sizes.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _quantization_group(model),
    }
    if settings["pipeline"] == "stateful":
        # Without a backend named, LLMPipeline is the continuous one in disguise.
        return Stateful(openvino_genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA", **properties))
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # or it would skip what the others compute
    scheduler.max_num_seqs = sizes.most_sequences
    scheduler.max_num_batched_tokens = 2048
    # cache_size stays 0: the KV cache grows as needed.
    return Continuous(openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties))


def convert(checkpoint: Path, out: Path, conversion: str) -> None:
    """float32 and float16 store the weights so; int8 is nncf's symmetric weight compression, a scale per channel."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(bits=8, sym=True) if conversion == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    if conversion == "float16":
        model.half()
    model.save_pretrained(out)
