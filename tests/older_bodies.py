"""What the tests of older servers' bodies share: V1's answer to compare with, and what a refusal looks like."""

from __future__ import annotations

from typing import Any

import httpx
import pytest


async def by_v1(client: httpx.AsyncClient, prompt: str, **parameters: Any) -> Any:
    """What V1's `:predict` says to one prompt."""
    body = {"instances": [prompt], "parameters": parameters}
    response = await client.post("/v1/models/tiny:predict", json=body)
    assert response.status_code == 200, response.text
    return response.json()["predictions"][0]


@pytest.fixture
def untouched(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when anything is submitted to the engine."""

    def refuse(*_: object) -> None:
        raise AssertionError("a bad request reached the engine")

    monkeypatch.setattr(predictor.language_model().backend, "submit", refuse)


def error_of(response: httpx.Response, status: int = 400) -> str:
    """The text of a refusal that says nothing of our insides."""
    assert response.status_code == status, response.text
    told = response.json()
    assert list(told) == ["error"]
    assert not any(word in told["error"] for word in ("Traceback", "Error:", "predictor.", "pydantic"))
    return str(told["error"])
