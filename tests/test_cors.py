"""What a browser's page of another origin may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from predictor.errors import ConfigurationError
from tests.guarded import ALICE, PREDICT, bearer, body, guarded, written

PAGE = "https://page.example"
ASKS = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}


@pytest.mark.parametrize("path", [PREDICT, "/v1/completions", "/v2/models/tiny/infer", "/v1/jobs", "/generate"])
async def test_a_listed_origin_may_call_every_route(path: str, predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, cors=(PAGE, "http://localhost:3000")) as client:
        allowed = await client.options(path, headers=ASKS | {"Access-Control-Request-Headers": "x-api-key"})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
        answer = await client.post(path, json=body(), headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"] == "Origin"
        exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert exposed == {"x-request-id", "Retry-After", "Location"}
        other = await client.post(path, json=body(), headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_any_origin_where_a_star_says_so(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, cors=("*",)) as client:
        answer = await client.post(PREDICT, json=body(), headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*"
        failed = await client.post(PREDICT, json={}, headers={"Origin": PAGE})
        assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (400, "*")


async def test_off_unless_asked_for(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path) as client:
        assert (await client.options(PREDICT, headers=ASKS)).status_code == 405
        answer = await client.post(PREDICT, json=body(), headers={"Origin": PAGE})
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_may_read_that_its_key_is_wrong(predictor: Any, tmp_path: Path) -> None:
    keys = written(tmp_path / "keys", f"alice:{ALICE}\n")
    async with guarded(predictor, tmp_path, cors=(PAGE,), api_keys=keys) as client:
        assert (await client.options(PREDICT, headers=ASKS)).status_code == 200
        refused = await client.post(PREDICT, json=body(), headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        answer = await client.post(PREDICT, json=body(), headers={"Origin": PAGE} | bearer(ALICE))
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)


@pytest.mark.parametrize("origin", ["page.example", PAGE + "/", PAGE + "/path", "https://Page.example", "null", ""])
async def test_what_no_browser_sends_is_refused_at_the_start(origin: str, predictor: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--cors must be"):
        async with guarded(predictor, tmp_path, cors=(origin,)):
            pass
