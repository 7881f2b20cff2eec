"""`/v1/jobs` as a client sees it: what is accepted, what is refused and how. No worker runs here."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from predictor.errors import Forbidden, InvalidRequest
from predictor.jobs.submission import submit
from predictor.protocols import strict_json
from predictor.protocols.wire import Limits
from predictor.server import jobs as jobs_module
from predictor.server.predictor import Predictor
from predictor.settings import NamedModel, load_settings
from tests.guarded import guarded

V1 = {"instances": ["To be"], "parameters": {"max_new_tokens": 4}}
COMPLETION = {"model": "tiny", "prompt": "To be", "max_tokens": 4}


async def post(client: httpx.AsyncClient, body: Any, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/v1/jobs", json=body, headers=named)


@pytest.mark.parametrize(
    "body",
    [
        V1,
        {"instances": [{"prompt": "a", "n": 3}], "model": "tiny", "signature_name": ""},
        {"inputs": ["a", "b"], "parameters": {"max_new_tokens": 4}},
        {"text": "To be", "length": 20},
        COMPLETION,
        {"prompt": ["a", "b"], "max_tokens": 2, "n": 2},
        {"prompt": [[40, 41]], "best_of": 3, "n": 1},
    ],
)
async def test_every_synchronous_body_is_a_job(client: httpx.AsyncClient, body: Any) -> None:
    answer = await post(client, body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == job["url"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["result"], job["error"]) == ("queued", None, None)
    assert job["progress"]["tokens"] == 0
    assert job["progress"]["of"] > 0
    seen = await client.get(job["url"])
    assert (seen.status_code, seen.json()) == (200, job)


async def test_ids_cannot_be_guessed(client: httpx.AsyncClient) -> None:
    ids = {(await post(client, V1)).json()["id"] for _ in range(20)}
    assert len(ids) == 20
    assert all(len(each.removeprefix("job-")) >= 22 for each in ids)  # 128 bits in base64


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ([], 400, "JSON object"),
        (None, 400, "JSON Parse error"),
        ({}, 400, "instances"),
        ({"instances": []}, 400, "instances"),
        (V1 | {"surprise": 1}, 400, "surprise"),
        (V1 | {"prompt": "x"}, 400, "instances"),
        (V1 | {"model": 7}, 400, "model"),
        (V1 | {"model": None}, 400, "model"),
        (V1 | {"model": "../../etc/passwd"}, 404, "../../etc/passwd"),
        (COMPLETION | {"model": "other"}, 404, "other"),
        (COMPLETION | {"model": ""}, 404, "Latest()"),
        ({"instances": ["x"], "parameters": {"max_new_tokens": 5000}}, 400, "max_new_tokens"),
        ({"instances": ["x " * 500]}, 400, "prompt"),
        ({"instances": ["x"], "parameters": {"stream": True}}, 400, "stream"),
        (COMPLETION | {"stream": True}, 400, "stream"),
        (COMPLETION | {"suffix": "x"}, 400, "suffix"),
        (COMPLETION | {"max_tokens": 5000}, 400, "max_tokens"),
        (COMPLETION | {"prompt": [10**30]}, 400, "vocabulary"),
        (COMPLETION | {"webhook": "ftp://x/"}, 400, "webhook"),
        (V1 | {"webhook": None}, 400, "webhook"),
        (V1 | {"webhook": "http://169.254.169.254/"}, 403, "--webhook-host"),
    ],
)
async def test_what_no_worker_could_do_is_refused_at_once(
    client: httpx.AsyncClient, body: Any, status: int, told: str
) -> None:
    answer = await post(client, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert told in (error["message"] if isinstance(body, dict) and "prompt" in body else error)


async def test_the_body_is_read_as_any_other(client: httpx.AsyncClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert (await client.post("/v1/jobs", content=json.dumps(V1), headers=form)).status_code == 202
    image = {"content-type": "image/png"}
    assert (await client.post("/v1/jobs", content=json.dumps(V1), headers=image)).status_code == 415
    assert (await client.post("/v1/jobs", content=b" " * 70_000)).status_code == 413
    assert (await client.post("/v1/jobs", content=b"{")).status_code == 400
    assert (await client.get("/v1/jobs")).status_code == 405


async def test_a_large_body_is_checked_off_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return submit(*arguments)

    monkeypatch.setattr(jobs_module, "submit", noted)
    for text in ("x", "x" * 100_000):
        await post(client, {"instances": [text[:60_000]]})
    small, large = threads
    assert small is threading.main_thread()
    assert large is not threading.main_thread()


async def test_a_model_that_loads_is_waited_for_and_one_that_is_unloaded_is_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = Predictor(load_settings({"model": f"tiny={checkpoint}"}), NamedModel("tiny", str(checkpoint)))
    async with guarded(model, tmp_path) as opened:
        accepted = await post(opened, V1)
        assert (accepted.status_code, accepted.json()["progress"]["of"]) == (202, None)
        for state, status, told in (("UNLOADING", 503, "being unloaded"), ("END", 404, "not loaded")):
            model.state = state
            refused = await post(opened, V1)
            assert (refused.status_code, told in refused.json()["error"]) == (status, True)


async def test_a_server_that_stops_waits_for_no_body(checkpoint: Path, tmp_path: Path) -> None:
    model = Predictor(load_settings({"model": f"tiny={checkpoint}"}), NamedModel("tiny", str(checkpoint)))

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        model.drain()
        await asyncio.sleep(60)

    async with guarded(model, tmp_path) as opened:
        answer = await asyncio.wait_for(opened.post("/v1/jobs", content=body()), 10)
        assert (answer.status_code, "shutting down" in answer.text) == (503, True)
        answer = await post(opened, V1)
        assert (answer.status_code, "shutting down" in answer.text) == (503, True)


async def test_without_a_store_there_are_no_jobs(predictor: Predictor, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, jobs="none") as opened:
        for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs/job-x"), ("DELETE", "/v1/jobs/job-x")):
            answer = await opened.request(method, path, json=V1)
            assert (answer.status_code, answer.json()["error"]) == (404, f"no such route: {method} {path}")
        assert not [path for path in (await opened.get("/openapi.json")).json()["paths"] if "jobs" in path]
        assert (await opened.post("/v1/models/tiny:predict", json=V1)).status_code == 200


async def test_a_key_makes_a_repeated_request_the_same_job(client: httpx.AsyncClient) -> None:
    key = uuid4().hex
    answers = await asyncio.gather(*(post(client, V1, idempotency_key=key) for _ in range(10)))
    assert [each.status_code for each in answers] == [202] * 10
    assert len({each.json()["id"] for each in answers}) == 1
    reordered = dict(reversed(V1.items()))
    assert (await post(client, reordered, idempotency_key=key)).json()["id"] == answers[0].json()["id"]
    for other in (COMPLETION, V1 | {"instances": ["not to be"]}):
        refused = await post(client, other, idempotency_key=key)
        assert refused.status_code == 422
        assert "Idempotency-Key" in refused.text
    assert (await post(client, V1, idempotency_key=uuid4().hex)).json()["id"] != answers[0].json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_has_a_length(client: httpx.AsyncClient, key: str) -> None:
    answer = await post(client, V1, idempotency_key=key)
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.json()["error"]


async def test_delete_cancels_and_then_removes(client: httpx.AsyncClient) -> None:
    url = (await post(client, V1)).json()["url"]
    assert (await client.delete(url)).json()["status"] == "cancelled"
    assert (await client.get(url)).json()["status"] == "cancelled"
    assert (await client.delete(url)).status_code == 200
    for method in ("GET", "DELETE"):
        answer = await client.request(method, url)
        assert answer.status_code == 404
        assert "no such job" in answer.json()["error"]


@pytest.mark.parametrize("wrong", ["x", "job-", "%00", "..%2f..%2fetc", "%ff%fe", "é", "x" * 3000])
async def test_an_unknown_id_is_a_404(client: httpx.AsyncClient, wrong: str) -> None:
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"/v1/jobs/{wrong}")).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "instances",
    "inputs",
    "text",
    "length",
    "prompt",
    "model",
    "webhook",
    "parameters",
    "stream",
    "n",
    "max_tokens",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5) | JSON)
def test_any_json_is_a_job_or_a_refusal(body: Any) -> None:
    try:
        sent = strict_json.loads(json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass"))
        submission = submit(sent, "tiny", Limits(8, 60), ["*"])
    except (InvalidRequest, Forbidden):
        return
    assert submission.exchange.requests
    assert json.loads(submission.job.body)
