"""What tests share: a tiny seeded GPT-2, a byte tokenizer, a server without a port. No network."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from predictor.backends.base import Backend, BackendOptions, open_backend

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Lines of the plays, kept here so that tests need no data set.
LINES = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

KING RICHARD III:
A horse! a horse! my kingdom for a horse!
"""

# A chat as a play: each speaker's name, what is said, and the end token.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == "assistant" and loop.first %}{{ raise_exception("the user begins") }}{% endif -%}
{{- message.name or message.role }}: {{ message.content }}{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt %}assistant: {% endif -%}
"""

_LEFT_OUT: list[str] = []


def left_out(reason: str) -> None:
    """Leave this test out because the machine lacks something; said in the summary, and a failure where CI=true."""
    _LEFT_OUT.append(f"{os.environ.get('PYTEST_CURRENT_TEST', '?').split(' ')[0]}: {reason}")
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section("left out on this machine")
        for line in _LEFT_OUT:
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _LEFT_OUT and os.environ.get("CI") == "true" and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def byte_tokenizer(context: int = 128) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the 256 bytes, a few merges, and <|endoftext|> as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the then there hello world hello the word banana"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=context,
    )


def tiny_model(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """A random 2-layer GPT-2 in fp32, wide enough in its logits that sampling and greedy differ."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": len(byte_tokenizer())}
    config = GPT2Config(**(shape | {"bos_token_id": 0, "eos_token_id": 0} | changes))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> GPT2LMHeadModel:
    """transformers' own view of `checkpoint`."""
    return GPT2LMHeadModel.from_pretrained(checkpoint).eval()


def open_quietly(folder: Path, name: str = "engine", **options: object) -> Backend:
    return open_backend(name, BackendOptions(folder=folder, **options), lambda done, total: None, threading.Event())


@pytest.fixture(scope="session")
def backend(checkpoint: Path) -> Iterator[Backend]:
    opened = open_quietly(checkpoint, prefill_chunk_tokens=16, step_tokens=48)
    yield opened
    opened.stop()


@pytest.fixture(scope="session")
def predictor(checkpoint: Path) -> Iterator[object]:
    """The loaded KServe model behind `client`."""
    from predictor.server.predictor import Predictor

    settings = small_limits(checkpoint)
    model = Predictor(settings, settings.models[0])
    model.load()
    yield model
    model.stop()


def small_limits(checkpoint: Path) -> object:
    from predictor.settings import load_settings

    template = checkpoint / "speakers.jinja"
    template.write_text(CHAT_TEMPLATE)
    return load_settings(
        {
            "model": f"tiny={checkpoint}",
            "chat_template": str(template),
            "max_instances": 8,
            "max_body_bytes": 65536,
            "timeout_s": 60,
            "jobs": f"sqlite:///{checkpoint}/jobs.sqlite3",
        }
    )


@pytest.fixture(scope="session")
def kserve_app(checkpoint: Path, predictor: object) -> object:
    """KServe's application with our routes and its own, no port. It is one global of KServe's: made once."""
    from kserve.model_server import app
    from kserve.protocol.rest.server import RESTServer

    from predictor.server.server import Server

    server = Server(small_limits(checkpoint))
    server.register_model(predictor)
    http = RESTServer("kserve.model_server:app", server.dataplane, server.model_repository_extension, 8080)
    http.create_application()
    return app


@pytest.fixture
async def client(kserve_app: object) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=kserve_app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


def transformers_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What transformers would draw from one row of logits [1, V]: [V]."""
    ids = torch.zeros((1, 1), dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(ids, logits.clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)[0]
