"""Several models in one server: each by its name, with its own metrics, the KV memory shared by budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import byte_tokenizer, tiny_model
from tests.guarded import body
from tests.processes import ServerProcess, serving


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("pair")
    tiny_model(seed=1).save_pretrained(folder / "second")
    byte_tokenizer().save_pretrained(folder / "second")
    flags = ("--model", f"first={checkpoint}", "--model", f"second={folder / 'second'}", "--kv-memory-mib", "8")
    with serving(folder / "log", *flags) as server:
        for name in ("first", "second"):
            server.wait_until_ready(name)
        yield server


def test_a_request_is_answered_by_the_model_it_names(pair: ServerProcess) -> None:
    asked = body("the word", max_new_tokens=12, do_sample=False)
    texts = {name: pair.predict(name, asked).json()["predictions"] for name in ("first", "second")}
    assert texts["first"] != texts["second"]
    assert pair.predict("first", asked).json()["predictions"] == texts["first"]
    assert pair.predict("third", asked).status_code == 404


def test_each_has_metrics_of_its_own(pair: ServerProcess) -> None:
    def tokens(name: str) -> float:
        return pair.metric("predictor_completion_tokens_total", f'model_name="{name}"')

    first, second = tokens("first"), tokens("second")
    assert pair.predict("second", body("the", max_new_tokens=5, ignore_eos=True)).status_code == 200
    assert tokens("first") == first
    assert tokens("second") == second + 5


def test_the_kv_memory_is_shared_equally(pair: ServerProcess) -> None:
    # 8 MiB in two, at 2 (K,V) * 2 layers * 64 * 4 bytes = 1 KiB a token.
    for name in ("first", "second"):
        assert pair.metric("predictor_kv_tokens", f'model_name="{name}"') == 4096
