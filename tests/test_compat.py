"""Older servers' routes together: each can be switched off, and nothing that is sent to them is a fault of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kserve import ModelRepository

from predictor.protocols.wire import Exchange
from predictor.server import compat, health
from predictor.server.ask import Asker
from predictor.server.errors import add_error_handlers
from predictor.server.middleware import Boundary
from predictor.settings import Settings


async def admit_all(request: Request, exchange: Exchange, model: Any) -> None:
    pass


def older_server(predictor: Any, admit: Any = admit_all, **changes: Any) -> FastAPI:
    """The older routes over a loaded model, and nothing else."""
    models = ModelRepository()
    models.update(predictor)
    given = predictor.settings.model_dump(exclude_unset=True) | changes
    ask = Asker(models, Settings(**given), admit)
    app = FastAPI()
    app.include_router(compat.make_router(ask))
    app.include_router(health.make_router(ask))
    add_error_handlers(app)
    app.add_middleware(Boundary)
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


ROUTES = {
    "cloud-run": [("POST", "/"), ("HEAD", "/"), ("GET", "/?length=3")],
    "huggingface-gpt": [("POST", "/generate")],
    "seldon": [
        ("POST", "/predict"),
        ("POST", "/send-feedback"),
        ("POST", "/api/v1.0/predictions"),
        ("POST", "/api/v1.0/feedback"),
    ],
    "nanogpt": [("POST", "/completions")],
}


@pytest.mark.parametrize("system", ROUTES)
async def test_a_system_that_is_not_named_has_no_routes(predictor: Any, system: str) -> None:
    others = tuple(name for name in ROUTES if name != system)
    async with client_of(older_server(predictor, compat=others)) as client:
        for name, routes in ROUTES.items():
            for method, path in routes:
                response = await client.request(method, path)
                if name != system:
                    assert response.status_code in (200, 400), f"{method} {path}"
                elif path.startswith("/?"):
                    assert response.json() == {"status": "alive"}
                else:
                    # `/` itself is there: KServe's liveness.
                    assert response.status_code == (405 if path == "/" else 404), f"{method} {path}"


async def test_none_switches_all_of_them_off(predictor: Any) -> None:
    async with client_of(older_server(predictor, compat=())) as client:
        assert [(await client.post(path)).status_code for path in ("/generate", "/predict", "/completions")] == [
            404
        ] * 3
        assert (await client.get("/?length=3")).json() == {"status": "alive"}


async def test_options_is_answered_where_cors_is_on(predictor: Any, client: httpx.AsyncClient) -> None:
    assert (await client.options("/")).status_code == 405
    async with client_of(older_server(predictor, cors=("https://page.example",))) as of_cors:
        response = await of_cors.options("/")
        assert (response.status_code, response.headers["allow"]) == (204, "GET, HEAD, POST, OPTIONS")
        # The middleware says who may read: a * of this route's own would let in whoever it keeps out.
        assert "access-control-allow-origin" not in (await of_cors.head("/")).headers


async def test_a_model_that_is_not_there_is_503_in_each_form(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "_language_model", None)
    async with client_of(older_server(predictor)) as client:
        for path, body in [
            ("/", {"length": 3}),
            ("/generate", {"text": {"plain": "a"}}),
            ("/predict", {"strData": "a"}),
            ("/completions", {"prompt": "a"}),
        ]:
            response = await client.post(path, json=body)
            assert response.status_code == 503, response.text
            assert int(response.headers["retry-after"]) > 0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SMALL = st.integers(1, 6) | st.sampled_from(["3", "0.5", "true"]) | st.floats(0, 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


def bodies(*names: str, **likely: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, most of them nearly right."""
    ours = ["seed", "top_k", "top_p", "temperature", "stop", "logit_bias", "bad_words", "do_sample", "n", "stream", "x"]
    optional = dict.fromkeys([*names, *ours], SMALL | JSON_VALUES)
    return st.fixed_dictionaries({}, optional=optional | likely)


MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries(
            {}, optional={"ndarray": st.lists(TEXTS | st.lists(TEXTS, max_size=2), max_size=3), "names": JSON_VALUES}
        ),
        "strData": TEXTS | JSON_VALUES,
        "meta": st.fixed_dictionaries(
            {"tags": bodies(max_new_tokens=st.just(2))}, optional={"puid": TEXTS, "requestPath": JSON_VALUES}
        ),
        "jsonData": JSON_VALUES,
    },
)
CASES: dict[str, st.SearchStrategy[Any]] = {
    "/": bodies("truncate", "include_prefix", "min_new_tokens", length=st.integers(1, 3), prefix=TEXTS),
    "/generate": bodies(
        "num_return_sequences",
        max_length=st.integers(5, 12),
        text=st.fixed_dictionaries({"plain": TEXTS}) | JSON_VALUES,
    ),
    "/predict": MESSAGES,
    "/send-feedback": st.fixed_dictionaries(
        {}, optional={"reward": JSON_VALUES | SMALL, "response": MESSAGES | JSON_VALUES, "truth": JSON_VALUES}
    ),
    "/completions": bodies(
        "logprobs", "echo", "best_of", "suffix", "user", prompt=TEXTS | JSON_VALUES, max_tokens=st.integers(1, 3)
    ),
}


@pytest.fixture(scope="module")
def older_app(predictor: Any) -> FastAPI:
    return older_server(predictor)


@pytest.mark.parametrize("path", CASES)
@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_no_body_is_a_fault_of_ours(older_app: FastAPI, path: str, data: st.DataObject) -> None:
    answer_of(older_app, "POST", path, content=json.dumps(data.draw(CASES[path])).encode())


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/completions")])
@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_no_query_is_a_fault_of_ours(older_app: FastAPI, method: str, path: str, data: st.DataObject) -> None:
    fields = data.draw(CASES[path])
    said = "&".join(
        f"{name}={quote(value if isinstance(value, str) else str(value))}" for name, value in fields.items()
    )
    broken = data.draw(st.sampled_from(["", "", "&", "%", "%ff", "&&=", "&length=1&length=2", "#", "=" * 50]))
    answer_of(older_app, method, f"{path}?{said}{broken}")


def answer_of(app: FastAPI, method: str, path: str, **options: Any) -> None:
    async def once() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    response = asyncio.run(once())
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text
