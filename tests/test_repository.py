"""Loading and unloading at run time: for the admin alone, with the memory given back."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tritonclient.http as triton

from predictor.errors import CheckpointError, NotFound, NotReady
from predictor.server.predictor import Predictor
from predictor.settings import load_settings
from tests.conftest import byte_tokenizer, tiny_model
from tests.guarded import ADMIN, ALICE, bearer, body, guarded, written
from tests.processes import ServerProcess, serving

REPOSITORY = "/v2/repository"

# 21 million parameters: 84 MB in fp32, which no other part of a server's memory hides.
_LARGE = {"n_layer": 6, "n_embd": 512, "n_head": 8}
_LARGE_MB = 76


def own_predictor(checkpoint: Path, **settings: Any) -> Predictor:
    """A model of the test's own: what happens to it concerns nobody else."""
    options = load_settings({"model": f"own={checkpoint}", "grace_period_s": 10} | settings)
    return Predictor(options, options.models[0])


async def in_state(model: Predictor, state: str, limit_s: float = 30) -> None:
    end = time.monotonic() + limit_s
    while model.state != state:
        assert time.monotonic() < end, f"{model.state}, not {state}"
        await asyncio.sleep(0.01)


async def test_off_without_an_admin_key(client: httpx.AsyncClient) -> None:
    for method, path in (
        ("POST", "/models/tiny/load"),
        ("POST", "/models/tiny/unload"),
        ("POST", "/models/other/load"),
        ("GET", "/index"),
        ("POST", "/index"),
    ):
        answer = await client.request(method, REPOSITORY + path, headers=bearer(ADMIN))
        assert answer.status_code == 403
        assert "switched off" in answer.json()["error"]


async def test_only_the_admins_key_opens_it(predictor: Any, tmp_path: Path) -> None:
    files = {
        "admin_key": written(tmp_path / "admin", ADMIN),
        "api_keys": written(tmp_path / "keys", f"alice:{ALICE}\n"),
    }
    async with guarded(predictor, tmp_path, **files) as client:
        for headers in ({}, bearer(ALICE), {"x-api-key": ALICE}, bearer("x" * 20)):
            for path in ("/models/tiny/unload", "/models/tiny/load", "/index"):
                refused = await client.post(REPOSITORY + path, headers=headers)
                assert refused.status_code == 401, path
                assert refused.headers["www-authenticate"] == "Bearer"
        assert predictor.state == "AVAILABLE"
        # The admin's key loads and unloads; it does not generate.
        assert (await client.post("/v1/models/tiny:predict", json=body(), headers=bearer(ADMIN))).status_code == 401
        for headers in (bearer(ADMIN), {"x-api-key": ADMIN}):
            for ask in (client.get, client.post):
                (entry,) = (await ask(f"{REPOSITORY}/index", headers=headers)).json()
                assert entry == {"name": "tiny", "version": "1", "state": "READY", "reason": ""}


async def test_a_name_is_one_of_the_servers_models_and_never_a_path(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, admin_key=written(tmp_path / "admin", ADMIN)) as client:
        for name in ("other", "%2e%2e", "..%2f..%2fetc", "tiny%00", "models%2Fbard", "tiny%20", "TINY"):
            for verb in ("load", "unload"):
                answer = await client.post(f"{REPOSITORY}/models/{name}/{verb}", headers=bearer(ADMIN))
                assert answer.status_code == 404, name
        assert predictor.state == "AVAILABLE"


@pytest.mark.parametrize(
    ("path", "sent", "told"),
    [
        ("/models/tiny/load", b'{"parameters": {"config": "{}"}}', "config"),
        ("/models/tiny/load", b'{"source": "elsewhere"}', "source"),
        ("/models/tiny/load", b'{"parameters": null}', "parameters"),
        ("/models/tiny/unload", b'{"parameters": {"unload_dependents": 1}}', "unload_dependents"),
        ("/models/tiny/unload", b"[]", "object"),
        ("/models/tiny/unload", b"{", "JSON"),
        ("/index", b'{"ready": "yes"}', "ready"),
        ("/index", b'{"name": "tiny"}', "name"),
    ],
)
async def test_no_field_is_ignored(path: str, sent: bytes, told: str, predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, admin_key=written(tmp_path / "admin", ADMIN)) as client:
        answer = await client.post(REPOSITORY + path, content=sent, headers=bearer(ADMIN))
        assert answer.status_code == 400, answer.text
        assert told in answer.json()["error"]
        assert predictor.state == "AVAILABLE"


async def test_nothing_holds_an_unloaded_model(checkpoint: Path) -> None:
    model = own_predictor(checkpoint)
    await model.start_engine()
    language_model = model.language_model()
    kept = [weakref.ref(language_model), weakref.ref(language_model.backend)]
    del language_model
    await model.unload()
    assert model.state == "END"
    with pytest.raises(NotFound, match="Servable not found for request: Latest"):
        model.language_model()
    gc.collect()
    assert [each() for each in kept] == [None, None]
    assert not [thread.name for thread in threading.enumerate() if thread.name == "load-own"]


async def test_loads_and_unloads_at_once_come_one_after_the_other(checkpoint: Path) -> None:
    model = own_predictor(checkpoint)
    await asyncio.gather(model.start_engine(), model.start_engine())
    first = model.language_model()
    await model.start_engine()
    assert model.language_model() is first, "one that is loaded stays as it is"
    await asyncio.gather(model.unload(), model.unload())
    assert model.state == "END"
    await asyncio.gather(model.unload(), model.start_engine(), model.start_engine())
    assert model.state == "AVAILABLE"
    await asyncio.gather(model.unload(), model.start_engine(), model.unload())
    assert model.state == "END"
    await model.unload()
    assert model.state == "END"


async def test_an_unload_ends_the_load_that_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    opened = _stalled(monkeypatch, began, go_on)
    model = own_predictor(checkpoint)
    loading = asyncio.create_task(model.start_engine())
    await asyncio.to_thread(began.wait, 30)
    with pytest.raises(NotReady, match="still loading"):
        model.language_model()
    unloading = asyncio.create_task(model.unload())
    await asyncio.sleep(0.05)
    assert not unloading.done(), "the thread still holds what it has loaded"
    go_on.set()
    await unloading
    await loading
    assert model.state == "END"
    assert opened == [True], "it was told to stop"
    await model.start_engine()
    assert model.state == "AVAILABLE"
    await model.unload()


def _stalled(monkeypatch: pytest.MonkeyPatch, began: threading.Event, go_on: threading.Event) -> list[bool]:
    """Let the first load wait for `go_on` before it looks whether to stop; returns what it then saw, per load."""
    import predictor.server.resident as room

    seen: list[bool] = []
    real = room.open_backend

    def slow(name: Any, options: Any, progress: Any, stop: threading.Event) -> Any:
        if not began.is_set():
            began.set()
            assert go_on.wait(30)
            seen.append(stop.is_set())
        return real(name, options, progress, stop)

    monkeypatch.setattr(room, "open_backend", slow)
    return seen


async def test_a_load_that_fails_says_why_and_may_be_tried_again(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.symlink_to(checkpoint)
    model = own_predictor(folder)
    await model.start_engine()
    await model.unload()
    folder.unlink()
    with pytest.raises(CheckpointError):
        await model.start_engine()
    assert model.state == "END"
    assert model.alive
    folder.symlink_to(checkpoint)
    await model.start_engine()
    assert model.state == "AVAILABLE"
    await model.unload()


async def test_what_runs_is_finished_and_past_the_grace_period_ended(checkpoint: Path) -> None:
    from predictor.text.request import TextRequest

    long = TextRequest("the", max_new_tokens=100, ignore_eos=True, n=16)
    model = own_predictor(checkpoint)
    await model.start_engine()
    running = asyncio.create_task(model.language_model().generate([long], 60))
    await _until(lambda: model.language_model().backend.load.running_requests > 0)
    await model.unload()
    (row,) = await running
    assert [each.completion_tokens for each in row] == [100] * 16

    model = own_predictor(checkpoint, grace_period_s=1, max_running=1)
    await model.start_engine()
    endless = [TextRequest("the", max_new_tokens=120, ignore_eos=True, n=16)] * 60
    running = asyncio.create_task(model.language_model().generate(endless, 60))
    await _until(lambda: model.language_model().backend.load.running_requests > 0)
    await model.unload()
    with pytest.raises(NotReady):
        await running


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tiny_model(**_LARGE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, large: Path, checkpoint: Path) -> Iterator[ServerProcess]:
    """A large model and the tiny one, with the admin's key."""
    folder = tmp_path_factory.mktemp("two")
    flags = ("--model", f"large={large}", "--model", f"tiny={checkpoint}")
    with serving(folder / "log", *flags, "--admin-key", written(folder / "admin", ADMIN)) as server:
        for name in ("large", "tiny"):
            server.wait_until_ready(name)
        yield server


def change(server: ServerProcess, name: str, verb: str) -> httpx.Response:
    return httpx.post(f"{server.url}{REPOSITORY}/models/{name}/{verb}", headers=bearer(ADMIN), timeout=60)


def test_a_server_goes_on_while_a_model_comes_and_goes(two: ServerProcess) -> None:
    def resident_mb() -> float:
        return psutil.Process(two.process.pid).memory_info().rss / 1e6

    asked = body("the", max_new_tokens=8)
    text = two.predict("large", asked).json()
    loaded_mb = resident_mb()
    assert two.metric("predictor_kv_tokens", 'model_name="large"') > 0
    for _ in range(3):
        assert change(two, "large", "unload").json() == {"name": "large", "unload": True}
        assert resident_mb() < loaded_mb - 0.8 * _LARGE_MB, "its memory is given back"
        assert two.predict("large", asked).status_code == 404
        assert two.get("/v1/models/large").status_code in (404, 503)
        for path in ("/", "/v2/health/live", "/v2/health/ready", "/v1/models/tiny"):
            assert two.get(path).status_code == 200, path
        assert two.predict("tiny", asked).status_code == 200
        shown = two.get("/metrics").text
        assert 'predictor_kv_tokens{model_name="large"' not in shown
        assert 'predictor_kv_tokens{model_name="tiny"' in shown
        assert change(two, "large", "load").json() == {"name": "large", "load": True}
        assert two.predict("large", asked).json() == text
        assert resident_mb() < loaded_mb + 0.3 * _LARGE_MB, "loading again takes no more than the first time"


def test_tritons_client_loads_and_unloads(two: ServerProcess) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{two.port}")
    headers = bearer(ADMIN)
    client.unload_model("tiny", headers=headers)
    states = {each["name"]: each["state"] for each in client.get_model_repository_index(headers=headers)}
    assert states == {"large": "READY", "tiny": "UNAVAILABLE"}
    client.load_model("tiny", headers=headers)
    assert client.is_model_ready("tiny")
    client.close()


def test_a_signal_in_the_midst_of_changes_ends_with_0(two: ServerProcess) -> None:  # the last to use it
    with ThreadPoolExecutor() as pool:
        changes = [pool.submit(change, two, "large", verb) for verb in ("unload", "load", "unload", "load")]
        time.sleep(0.3)
        two.terminate()
        assert two.wait(30) == 0, two.log.read_text()
        for each in changes:
            if each.exception() is None:
                assert each.result().status_code in (200, 404, 503)
    assert "Traceback" not in two.log.read_text()
