"""benchmarks/make_checkpoint.py writes what AutoModelForCausalLM and AutoTokenizer open, at OpenAI's shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from benchmarks.make_checkpoint import SHAPES, config, shapes
from predictor.model.config import parse_config
from tests.conftest import ROOT

# OpenAI's published counts, with the output matrix tied.
PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("size", SHAPES)
def test_every_size_has_openais_parameter_count(size: str) -> None:
    assert sum(torch.Size(shape).numel() for _, shape in shapes(size)) == PARAMETERS[size]
    assert parse_config(config(size, "float32")).parameters == PARAMETERS[size]


def test_names_and_shapes_are_transformers_own() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert dict(shapes("gpt2")) == wanted


def test_the_folder_opens_offline(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "make_checkpoint.py"
    command = [sys.executable, str(script), "--size", "gpt2", "--out", str(tmp_path), "--dtype", "float16"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert AutoConfig.from_pretrained(tmp_path).n_layer == 12
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float16
