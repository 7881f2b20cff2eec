"""models/bard: small, ours, and a language model of Shakespeare."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import LINES, ROOT

BARD = ROOT / "models" / "bard"


def test_it_is_small_and_has_its_papers() -> None:
    assert sum(path.stat().st_size for path in BARD.rglob("*") if path.is_file()) <= 8 * 10**6
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md", "loss.png"} <= {
        p.name for p in BARD.iterdir()
    }
    assert json.loads((BARD / "config.json").read_text())["n_positions"] >= 256


def test_it_predicts_shakespeare_far_better_than_chance() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BARD)
    model = AutoModelForCausalLM.from_pretrained(BARD, dtype=torch.float32).eval()
    ids = tokenizer(LINES, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    bits_per_byte = loss * (ids.shape[1] - 1) / len(LINES.encode()) / 0.6931
    assert bits_per_byte < 2.8, "a uniform guess over its vocabulary takes more than 4"


def test_its_tokenizer_reads_back_what_it_wrote() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BARD)
    for text in (LINES, "naïve café 😀\n\t ", "\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
