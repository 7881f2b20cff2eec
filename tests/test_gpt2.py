"""Our forward against transformers: the tiny shape, every variant of the configuration, and the 124M shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from predictor.checkpoints.load import load_gpt2
from predictor.model.gpt2 import GPT2, Rows, Span
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def run(model: GPT2, ids: Tensor, chunks: list[int], first_slot: int = 0) -> Tensor:
    """All logits of one sequence [T, V], computed in chunks of the given sizes."""
    kv = model.new_kv(first_slot + len(ids))
    logits, start = [], 0
    for size in chunks:
        span = Span(0, size, first_slot, start + size)
        rows = Rows(ids[start : start + size].tolist(), [span], list(range(size)))
        logits.append(model.forward(rows, kv))
        start += size
    return torch.cat(logits)


@torch.no_grad()
def reference(oracle: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    return oracle(ids[None]).logits[0].float()


def prompt(vocabulary: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "chunks", [[100], [64, 36], [1] * 100, [99, 1], [16] * 6 + [4]], ids=lambda c: f"{len(c)}x{c[0]}"
)
def test_logits_match_transformers(checkpoint: Path, oracle: GPT2LMHeadModel, chunks: list[int]) -> None:
    model = load_gpt2(checkpoint, torch.float32, CPU)
    ids = prompt(model.config.vocabulary, 100)
    assert (run(model, ids, chunks, first_slot=11) - reference(oracle, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"n_inner": 100},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-2},
        {"n_head": 1},
        {"n_layer": 1, "n_embd": 96, "n_head": 3},
    ],
    ids=str,
)
def test_every_variant_of_the_configuration(tmp_path: Path, changes: dict[str, object]) -> None:
    oracle = tiny_model(**changes)
    oracle.save_pretrained(tmp_path)
    model = load_gpt2(tmp_path, torch.float32, CPU)
    ids = prompt(model.config.vocabulary, 40)
    assert (run(model, ids, [32, 8]) - reference(oracle, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_formats_stay_near_fp32(tmp_path: Path, dtype: torch.dtype, most: float) -> None:
    """Relative to the logits' spread, on weights as GPT-2 begins with (the tiny model's are blown up for sampling)."""
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=3, n_embd=128, n_head=4, n_positions=128, vocab_size=400, bos_token_id=0, eos_token_id=0)
    oracle = GPT2LMHeadModel(shape)
    oracle.eval().save_pretrained(tmp_path)
    model = load_gpt2(tmp_path, dtype, CPU)
    ids = prompt(400, 100)
    wanted = reference(oracle, ids)
    error = (run(model, ids, [64, 35, 1]) - wanted).norm() / wanted.norm()
    assert error <= most


@pytest.fixture(scope="module")
def gpt2_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


def test_124m_logits_and_200_greedy_tokens_are_transformers(gpt2_shape: Path) -> None:
    model = load_gpt2(gpt2_shape, torch.float32, CPU)
    oracle = GPT2LMHeadModel.from_pretrained(gpt2_shape).eval()
    ids = prompt(model.config.vocabulary, 300)
    difference = (run(model, ids, [128, 128, 44]) - reference(oracle, ids)).abs().max()
    assert difference <= 1e-4

    begin = ids[:20]
    wanted = oracle.generate(
        begin[None], max_new_tokens=200, do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    kv, tokens = model.new_kv(220), begin.tolist()
    position = 0
    while len(tokens) < 220:
        fresh = tokens[position:]
        rows = Rows(fresh, [Span(0, len(fresh), 0, len(tokens))], [len(fresh) - 1])
        position = len(tokens)
        tokens.append(int(model.forward(rows, kv)[0].argmax()))
    assert tokens == wanted[0].tolist()


def test_sequences_in_one_batch_do_not_touch_each_other(checkpoint: Path) -> None:
    model = load_gpt2(checkpoint, torch.float32, CPU)
    a, b = prompt(model.config.vocabulary, 30, 1), prompt(model.config.vocabulary, 17, 2)
    kv = model.new_kv(64)
    spans = [Span(0, 30, 30, 30), Span(30, 17, 2, 17)]
    together = model.forward(Rows([*a.tolist(), *b.tolist()], spans, [29, 46]), kv)
    assert torch.equal(together[0], run(model, a, [30])[-1])
    assert torch.equal(together[1], run(model, b, [17])[-1])


def test_a_step_without_wanted_rows_gives_none(checkpoint: Path) -> None:
    model = load_gpt2(checkpoint, torch.float32, CPU)
    rows = Rows(prompt(model.config.vocabulary, 4).tolist(), [Span(0, 4, 0, 4)], [])
    assert model.forward(rows, model.new_kv(4)).shape == (0, model.config.vocabulary)


@pytest.mark.parametrize("shape", [{}, {"n_inner": 100}, {"tie_word_embeddings": False}])
def test_the_parameter_count_is_exact(tmp_path: Path, shape: dict[str, object]) -> None:
    oracle = tiny_model(**shape)
    oracle.save_pretrained(tmp_path)
    assert load_gpt2(tmp_path, torch.float32, CPU).config.parameters == oracle.num_parameters()
