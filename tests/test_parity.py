"""`predictor parity`: its figures against transformers, its limits, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel
from typer.testing import CliRunner

from predictor.cli import app
from predictor.errors import CheckpointError, ConfigurationError
from predictor.evaluation import models
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.options import LIMITS, Limits, ParityOptions, limits_of
from predictor.evaluation.parity import parity
from predictor.evaluation.report import as_json
from predictor.evaluation.verdicts import judge
from predictor.evaluation.windows import read_windows
from predictor.settings import flag
from tests.conftest import ROOT, SHARED, byte_tokenizer, left_out, tiny_model

BARD = ROOT / "models" / "bard"
CPU = torch.device("cpu")
PROMISED = {
    "perplexity",
    "reference_perplexity",
    "top1_agreement",
    "kl",
    "max_abs_logit_difference",
    "nan_count",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of the tiny model's 128 tokens, and some more."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("hello the word banana, then a world there 0123456789 é\n" * 12, encoding="utf-8")
    return path


def options(model: Path, text: Path, dtype: str = "float32", **changes: Any) -> ParityOptions:
    given = {"windows": None, "rows": 128, "reference": "predictor", "json": None, "plot": None}
    given |= {"limits": LIMITS[dtype]} | changes
    return ParityOptions(model=str(model), dtype=dtype, device="cpu", text=text, **given)


def run(model: Path, text: Path, *flags: str) -> Any:
    return CliRunner().invoke(app, ["parity", "--model", str(model), "--text", str(text), "--device", "cpu", *flags])


def losses(model: GPT2LMHeadModel, windows: list[list[int]]) -> float:
    """transformers' own loss of each window, averaged: the windows are of one length."""
    with torch.no_grad():
        each = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.double().item() for ids in windows]
    return sum(each) / len(each)


def test_float32_is_transformers_float32(checkpoint: Path, oracle: GPT2LMHeadModel, text: Path) -> None:
    report = parity(options(checkpoint, text, reference="transformers"))
    measures = report.measures
    assert report.windows >= 2
    assert report.window_tokens == report.context == 128
    assert measures.kl < 1e-9
    assert measures.top1_agreement == 1.0
    assert 0 < measures.max_abs_logit_difference < 1e-3
    assert measures.nan_count == measures.infinite_count == 0
    assert not report.failures
    windows = read_windows(text, byte_tokenizer(), 128, None).ids
    assert math.log(measures.reference_perplexity) == pytest.approx(losses(oracle, windows), rel=1e-6)
    assert math.log(measures.perplexity) == pytest.approx(losses(oracle, windows), rel=1e-6)


def test_float32_is_the_reference_whole_or_token_by_token(checkpoint: Path, text: Path) -> None:
    whole = parity(options(checkpoint, text, windows=1, rows=1000)).measures
    stepped = parity(options(checkpoint, text, windows=1, rows=1)).measures
    # What serves is the CPU kernels, and the reference is torch.
    assert max(abs(whole.kl), abs(stepped.kl)) < 1e-10
    assert max(whole.max_abs_logit_difference, stepped.max_abs_logit_difference) < 1e-4
    assert stepped.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_the_bundled_model_keeps_within_the_limits_of_each_width(dtype: str) -> None:
    play = SHARED / "data" / "tinyshakespeare.txt"
    if not play.is_file():
        left_out("tinyshakespeare.txt is not here")
    report = parity(options(BARD, play, dtype, windows=2))
    measures = report.measures
    assert not report.failures
    assert report.window_tokens == 256
    assert 0 < measures.kl < LIMITS[dtype].max_kl / 10
    assert measures.kl <= measures.kl_p99 <= measures.kl_max
    assert 0 < measures.max_abs_logit_difference < 1


def test_measures_are_what_their_names_say() -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 11, (2, 70)).tolist()
    truth = [torch.randn(70, 11) for _ in ids]
    logits = [each + torch.randn(70, 11) / 4 for each in truth]
    comparison = Comparison()
    for window, ours, theirs in zip(ids, logits, truth, strict=True):
        comparison.add(window, ours.split(50), theirs.split(50))
    measures, curves = comparison.measures(), comparison.curves()

    p, q = torch.cat(truth).double().softmax(-1), torch.cat(logits).double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert measures.kl == pytest.approx(kl.mean().item())
    assert measures.kl_max == pytest.approx(kl.max().item())
    assert measures.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert measures.max_abs_logit_difference == (torch.cat(logits) - torch.cat(truth)).abs().max()

    def perplexity(windows: list[Tensor]) -> float:
        right = [
            each.double().softmax(-1)[place, token].log().item()
            for each, window in zip(windows, ids, strict=True)
            for place, token in enumerate(window[1:])
        ]
        return math.exp(-sum(right) / len(right))

    assert measures.perplexity == pytest.approx(perplexity(logits))
    assert measures.reference_perplexity == pytest.approx(perplexity(truth))
    assert measures.perplexity_loss == pytest.approx(perplexity(logits) / perplexity(truth) - 1)
    assert torch.allclose(curves.kl, kl.view(2, 70).mean(0))
    assert curves.difference_counts.sum() == 2 * 70 * 11


def test_json_holds_the_promised_keys_and_how_it_was_made(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    result = run(checkpoint, text, "--dtype", "bfloat16", "--windows", "1", "--json", str(path))
    told = json.loads(path.read_text())
    assert told.keys() >= PROMISED
    assert (told["dtype"], told["device"], told["context"], told["windows"]) == ("bfloat16", "cpu", 128, 1)
    assert told["perplexity_loss"] == pytest.approx(told["perplexity"] / told["reference_perplexity"] - 1)
    assert told["passed"] == (result.exit_code == 0) == (told["failures"] == [])
    for word in ("perplexity", "top-1 agreement", "KL", "1 window of 128 tokens", "bfloat16 against float32"):
        assert word in result.output


def test_within_the_limits_the_exit_code_is_0(checkpoint: Path, text: Path) -> None:
    result = run(checkpoint, text, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "FAILED" not in result.output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"--max-kl": "1e-12"}, "above --max-kl 1e-12"),
        ({"--min-top1": "1.1"}, "below --min-top1 1.1"),
        ({"--max-perplexity-loss": "-0.5"}, "above --max-perplexity-loss -0.5"),
        ({"--max-kl": "nan"}, "above --max-kl nan"),
    ],
    ids=str,
)
def test_past_a_limit_the_exit_code_is_1_and_it_is_named(
    checkpoint: Path, text: Path, given: dict[str, str], said: str
) -> None:
    wide = {"--max-kl": "9", "--min-top1": "0", "--max-perplexity-loss": "9"} | given
    flags = [part for pair in wide.items() for part in pair]
    result = run(checkpoint, text, "--dtype", "bfloat16", "--windows", "1", *flags)
    assert result.exit_code == 1
    assert said in result.output
    assert result.output.count("failed: ") == 1
    assert result.output.count("FAILED") == 1


def test_a_failure_says_by_how_much() -> None:
    comparison = Comparison()
    comparison.add([0, 1], [torch.tensor([[0.0, 1.0], [0.0, 1.0]])], [torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
    (failure,) = (
        verdict.failure for verdict in judge(comparison.measures(), Limits(0.0, 0.75, 1.0)) if verdict.failure
    )
    assert failure == "top-1 agreement is 0.5, 0.25 below --min-top1 0.75"


def damaged(folder: Path, tensor: str, place: tuple[int, ...], value: float) -> Path:
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(each for each in tensors if each.endswith(tensor))
    tensors[name][place] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_nan_fails_and_is_counted(text: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "parity.json", tmp_path / "parity.png"
    folder = damaged(tmp_path / "model", "wpe.weight", (100, 0), float("nan"))
    flags = ["--dtype", "float16", "--windows", "1", "--rows", "1", "--json", str(path), "--plot", str(picture)]
    result = run(folder, text, *flags)
    assert result.exit_code == 1
    told = json.loads(path.read_text())
    # What comes after the damaged position looks at it.
    assert told["nan_count"] == told["reference_nan_count"] == 28 * len(byte_tokenizer())
    assert told["perplexity"] is told["kl"] is told["max_abs_logit_difference"] is None
    assert 0.5 < told["top1_agreement"] <= 100 / 128
    assert "NaN logits, and none may be" in result.output
    assert "KL is not a number" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_only_overflows_in_float16_is_seen(text: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "model", "h.0.mlp.c_fc.weight", (0, 0), 1e6)  # float16 ends at 65,504
    report = parity(options(folder, text, "float16", windows=1))
    assert report.measures.nan_count + report.measures.infinite_count > 0
    assert report.measures.reference_nan_count == 0
    assert report.failures
    json.dumps(as_json(report), allow_nan=False)
    assert not parity(options(folder, text, "float32", windows=1)).failures


def test_an_infinite_logit_fails_without_a_nan() -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = -math.inf
    comparison = Comparison()
    comparison.add([0, 1], [logits], [torch.zeros(2, 3)])
    measures = comparison.measures()
    assert (measures.nan_count, measures.infinite_count) == (0, 1)
    assert measures.top1_agreement == 0.5
    assert any("infinite" in str(verdict.failure) for verdict in judge(measures, Limits(9, 0, math.inf)))


def test_windows_follow_one_another_and_the_rest_is_told(text: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    windows = read_windows(text, tokenizer, 100, None)
    assert [token for window in windows.ids for token in window] == ids[: len(windows.ids) * 100]
    assert windows.tokens_left_out == len(ids) % 100
    two = read_windows(text, tokenizer, 100, 2)
    assert (two.ids, two.tokens_left_out) == (windows.ids[:2], len(ids) - 200)


def test_a_text_shorter_than_the_context_is_one_shorter_window(checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("banana")
    result = run(checkpoint, short, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    tokens = len(byte_tokenizer().encode("banana"))
    assert f"1 window of {tokens} tokens (the text is shorter than the context of 128)" in told


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (b"", [], "at least 2 tokens, got 0"),
        (b"x", [], "at least 2 tokens, got 1"),
        (b"good\xff\xfe", [], "not UTF-8 at byte 4"),
        (None, [], "--text: cannot read"),
        (b"hello the", ["--dtype", "int3"], "--dtype"),
        (b"hello the", ["--device", "tpu"], "--device tpu"),
        (b"hello the", ["--json", "/nowhere/at/all.json"], "--json: cannot write"),
        (b"hello the", ["--plot", "/"], "--plot: cannot write"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said(
    checkpoint: Path, tmp_path: Path, content: bytes | None, flags: list[str], said: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = run(checkpoint, path, *flags)
    assert isinstance(result.exception, ConfigurationError)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "said"),
    [([], "--text"), (["--text", "x", "--windows", "0"], "--windows"), (["--text", "x", "--reference", "y"], "'y'")],
    ids=str,
)
def test_wrong_flags_are_usage_errors_that_name_them(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["parity", *flags])
    assert result.exit_code == 2
    assert said in result.output


def test_transformers_makes_up_no_weights(text: Path, tmp_path: Path) -> None:
    folder = damaged(tmp_path / "model", "ln_f.bias", (0,), 0.0)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if not name.endswith("ln_f.bias")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensors .*ln_f\.bias"):
        models.open_reference("transformers", folder, CPU, lambda done, total: None)


def test_the_plot_is_drawn_even_when_nothing_differs(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "parity.png"
    result = run(checkpoint, text, "--dtype", "float32", "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_told_before_anything_is_loaded(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(models, "open_reference", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match=r"pip install gpt2-predictor\[train\]"):
        parity(options(checkpoint, text, plot=tmp_path / "parity.png"))


def test_the_readme_names_flags_that_are_flags() -> None:
    known = CliRunner().invoke(app, ["parity", "--help"], terminal_width=200).output
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("### Number formats")[1].split("|")[0]
    commands = [line for line in readme.splitlines() if "predictor parity" in line]
    named = set(re.findall(r"--[a-z][a-z0-9-]+", " ".join([section, *commands])))
    assert {"--text", "--dtype", "--rows"} <= named
    for name in named:
        assert f"{name} " in known, name


def test_help_tells_every_limit_of_every_width() -> None:
    told = " ".join(CliRunner().invoke(app, ["parity", "--help"], terminal_width=200).output.split())
    for dtype, limits in LIMITS.items():
        for name in ("max_perplexity_loss", "min_top1", "max_kl"):
            assert f"{flag(name)} " in told
            assert f"{dtype} {getattr(limits, name):g}" in told


def test_a_given_limit_takes_the_place_of_the_widths_own() -> None:
    limits = limits_of("int8", max_perplexity_loss=None, min_top1=0.5, max_kl=0.0)
    assert limits == Limits(LIMITS["int8"].max_perplexity_loss, 0.5, 0.0)
    assert LIMITS["int8"].max_perplexity_loss == 0.01, "what this project promises of int8"


def test_as_a_process_an_error_is_one_line_and_exit_1(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    command = [sys.executable, "-m", "predictor", "parity", "--model", str(BARD), "--text", str(empty)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [f"error: --text {empty} must hold at least 2 tokens, got 0"]
