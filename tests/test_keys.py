"""API keys: the file, its changes, and what answers without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import REGISTRY

from predictor.errors import ConfigurationError
from predictor.guard.keys import parse_admin_key, parse_keys
from predictor.guard.watched import Watched, warn_if_readable_by_all
from tests.guarded import ALICE, BOB, PREDICT, bearer, body, guarded, written
from tests.processes import serving

FILE = f"# who may ask\nalice:{ALICE}\n\nbob:{BOB}\n"


def test_a_key_is_known_by_its_name() -> None:
    keys = parse_keys(FILE)
    assert keys.name_of(ALICE.encode()) == "alice"
    assert keys.name_of(BOB.encode()) == "bob"
    for other in (b"", ALICE[:-1].encode(), ALICE.upper().encode(), f"alice:{ALICE}".encode(), b"\xff" * 40):
        assert keys.name_of(other) is None


def test_a_key_may_hold_colons_and_equal_signs() -> None:
    assert parse_keys("x:a:b:c==0123456789\n").name_of(b"a:b:c==0123456789") == "x"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no key"),
        ("# nothing\n\n", "no key"),
        (ALICE, "line 1 must be NAME:KEY"),
        (f"a b:{ALICE}", "line 1 must be NAME:KEY"),
        (f":{ALICE}", "line 1 must be NAME:KEY"),
        ("alice:short-of-sixteen"[:21], "at least 16"),
        ("alice:", "at least 16"),
        (f"\nalice:{ALICE} {BOB}", "line 2: a key has"),
        (f"alice:{ALICE}é", "line 1: a key has"),
        (f"alice:{ALICE}\nalice:{BOB}", "line 2 names alice again"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2 has a key that stands above"),
    ],
)
def test_a_weak_file_is_refused_and_its_keys_are_not_told(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as refused:
        parse_keys(text)
    assert ALICE not in str(refused.value)


@pytest.mark.parametrize("text", ["", f"{ALICE}\n{BOB}\n", "short", f"{ALICE} {BOB}"])
def test_an_admin_file_holds_one_key(text: str) -> None:
    assert parse_admin_key(f"# comment\n{ALICE}\n").name_of(ALICE.encode()) == "admin"
    with pytest.raises(ConfigurationError):
        parse_admin_key(text)


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    watched = Watched("--api-keys", written(path, f"alice:{ALICE}\n"), parse_keys)
    assert watched.value.name_of(BOB.encode()) is None

    new = tmp_path / "new"  # as Kubernetes and editors replace a file
    written(new, FILE)
    new.replace(path)
    assert watched.value.name_of(BOB.encode()) == "bob"

    written(path, f"alice:{ALICE}\n")  # as a shell does
    assert watched.value.name_of(BOB.encode()) is None

    for broken in ("", "alice:short", None):
        caplog.clear()
        path.unlink() if broken is None else path.write_text(broken)
        with caplog.at_level(logging.INFO, "predictor"):
            for _ in range(3):
                assert watched.value.name_of(ALICE.encode()) == "alice"
                assert watched.value.name_of(b"") is None
        assert len(caplog.records) == 1, "said once, not at every request"
    path.write_bytes(b"\xff\xfe")
    assert watched.value.name_of(ALICE.encode()) == "alice"

    written(path, f"bob:{BOB}\n")
    assert watched.value.name_of(BOB.encode()) == "bob"
    assert watched.value.name_of(ALICE.encode()) is None
    assert ALICE not in caplog.text


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_file_that_cannot_be_read_is_refused_at_the_start(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--api-keys: .* cannot be read"):
        Watched("--api-keys", str(tmp_path / path), parse_keys)


def test_a_file_that_everybody_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    written(path, FILE)
    warn_if_readable_by_all("--api-keys", str(path))
    assert not caplog.records
    path.chmod(0o644)
    warn_if_readable_by_all("--api-keys", str(path))
    assert "every user" in caplog.text


async def test_a_key_is_needed_and_probes_are_exempt(predictor: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "keys", FILE)
    before = REGISTRY.get_sample_value("predictor_refused_total", {"revision": "", "reason": "invalid_api_key"}) or 0
    async with guarded(predictor, tmp_path, api_keys=path) as client:
        for headers in (
            {},
            bearer("wrong-key-0123456789"),
            {"Authorization": ALICE},
            {"Authorization": f"Basic {ALICE}"},
            {"Authorization": "Bearer "},
            {"x-api-key": ""},
            {"x-api-key": "wrong-key-0123456789"},
            bearer("\xff" * 20),
        ):
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            refused = await client.post(PREDICT, json=body(), headers=raw)
            assert (refused.status_code, list(refused.json())) == (401, ["error"]), headers
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-request-id"]
        for headers in (bearer(ALICE), {"authorization": f"bearer {BOB}"}, {"x-api-key": BOB}):
            assert (await client.post(PREDICT, json=body(), headers=headers)).status_code == 200

        for path in (
            "/",
            "/v2/health/live",
            "/v2/health/ready",
            "/v1/models/tiny",
            "/v2/models/tiny/ready",
            "/docs",
            "/openapi.json",
            "/ui",
        ):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.options("/")).status_code != 401
        for path in (
            "/?prefix=x",
            "/v1/models",
            "/v2/models/tiny",
            "/v1/jobs/x",
            "/v2",
            "/no/such",
            "/v1/models/tiny/x",
        ):
            assert (await client.get(path)).status_code == 401, path
        for path in (
            "/",
            "/v2/health/live",
            "/v1/models/tiny",
            "/v1/completions",
            "/generate",
            "/v1/jobs",
            "/completions",
        ):
            assert (await client.post(path, json={})).status_code == 401, path
        assert (await client.delete("/v1/jobs/x")).status_code == 401
    after = REGISTRY.get_sample_value("predictor_refused_total", {"revision": "", "reason": "invalid_api_key"})
    assert after > before


async def test_a_path_that_only_looks_like_a_probe_needs_a_key(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, api_keys=written(tmp_path / "keys", FILE)) as client:
        for path in ("/v2/health/ready/../../models/x", "//", "/metrics/x", "/v2/health/ready%2F..", "/ui/x/y", "/?"):
            answer = await client.request("POST", path, json=body())
            assert answer.status_code == 401, path
        assert (await client.get("/v1/models/tiny%2Fmetadata")).status_code == 401


async def test_openais_paths_refuse_in_openais_words(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, api_keys=written(tmp_path / "keys", FILE)) as http:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="wrong-key-0123456789", http_client=http, max_retries=0
        )
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.completions.create(model="tiny", prompt="x")
        assert refused.value.code == "invalid_api_key"
        right = client.with_options(api_key=ALICE)
        answer = await right.completions.create(model="tiny", prompt="x", max_tokens=1, seed=1)
        assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_server_with_keys_reads_changes_and_never_logs_a_key(tmp_path: Path, checkpoint: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "log"
    written(keys, f"alice:{ALICE}\n")
    flags = ("--model", f"tiny={checkpoint}", "--api-keys", str(keys), "--log-level", "debug")
    with serving(log, *flags) as server:
        server.wait_until_ready("tiny")
        assert server.get("/metrics").status_code == 200
        assert server.predict("tiny", body()).status_code == 401
        assert server.predict("tiny", body(), headers=bearer(ALICE)).status_code == 200
        assert server.predict("tiny", body(), headers=bearer(BOB)).status_code == 401
        keys.write_text(f"bob:{BOB}\n")
        assert server.predict("tiny", body(), headers=bearer(BOB)).status_code == 200
        assert server.predict("tiny", body(), headers=bearer(ALICE)).status_code == 401
        keys.write_text("")
        assert server.predict("tiny", body(), headers=bearer(BOB)).status_code == 200
        assert server.predict("tiny", body()).status_code == 401
        assert server.metric("predictor_refused_total", 'reason="invalid_api_key"') == 4
        server.terminate()
        assert server.wait() == 0
    text = log.read_text()
    assert "was read again" in text
    assert "there is no key in it" in text
    assert ALICE not in text
    assert BOB not in text


def test_a_server_does_not_start_with_a_weak_file(tmp_path: Path, checkpoint: Path) -> None:
    keys = written(tmp_path / "keys", "alice:short\n")
    with serving(tmp_path / "log", "--model", f"tiny={checkpoint}", "--api-keys", keys) as server:
        assert server.wait() == 1
    assert "error: --api-keys" in (tmp_path / "log").read_text()
