"""Rate limits, banned prompts and strikes: over every format, by caller, and with a file that changes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from predictor.errors import ConfigurationError
from predictor.guard.counters import RateLimit, Store, Strikes
from predictor.guard.patterns import parse_patterns
from tests.conftest import byte_tokenizer
from tests.guarded import ALICE, BOB, PREDICT, bearer, begin_early_in_a_minute, body, guarded, written
from tests.processes import serving

BANNED = "# what nobody may ask\nthe (forbidden|unspeakable)\\sword\n(?-i)SECRET\n^anchored\\b\n"
BAD = "say the Forbidden WORD now"
ANCHORED = "anchored"


def test_case_is_ignored_unless_a_pattern_says_otherwise() -> None:
    patterns = parse_patterns(BANNED)
    assert patterns.find(["nothing", BAD]) == 2
    assert patterns.find(["a SECRET"]) == 3
    assert patterns.find(["a secret", "the word", ""]) is None


def test_a_pattern_sees_any_script_and_any_line() -> None:
    patterns = parse_patterns("ЗАПРЕТ\nstraße\n^begin$\n(?m)^line$\n")
    assert patterns.find(["это запрет"]) == 1
    assert patterns.find(["STRAßE"]) == 2
    assert patterns.find(["begin\nother"]) is None
    assert patterns.find(["other\nline\n"]) == 4
    assert patterns.find(["\ud800"]) is None


@pytest.mark.parametrize("bad", ["(a", "a**", r"(?=x)", r"(a)\1", "[z-a]", "a{1001}", "(((a{100}){100}){100})"])
def test_a_broken_line_is_refused_with_its_number(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="line 3 is no regular expression"):
        parse_patterns(f"# comment\nfine\n{bad}\n")


@pytest.mark.parametrize("bad", ["x*", "|", "^"])
def test_a_line_that_bans_everything_is_refused(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="line 1 matches every prompt"):
        parse_patterns(bad)


async def test_a_pattern_made_to_run_for_ever_holds_up_nobody() -> None:
    """Python's own engine needs 2^40 steps for 40 of these characters; the time limit is the test's own."""
    patterns = parse_patterns("^(a+)+$\n([a-z]+)*!\n(a|a)*b\n")
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    found = await asyncio.to_thread(patterns.find, ["a" * 500_000 + "?"])
    other.cancel()
    assert found is None
    assert turns > 0


async def test_a_limit_counts_each_caller_alone_and_says_when_to_come_back() -> None:
    begin_early_in_a_minute()
    limit = RateLimit(Store(None), 3)
    assert [await limit.take("a") for _ in range(3)] == [None] * 3
    wait_s = await limit.take("a")
    assert wait_s is not None
    assert 1 <= wait_s <= 60
    assert await limit.take("b") is None


async def test_strikes_expire() -> None:
    strikes = Strikes(Store(None), 2, 1)
    await strikes.add("a")
    assert not await strikes.out("a")
    await strikes.add("a")
    assert await strikes.out("a")
    assert not await strikes.out("b")
    end = time.monotonic() + 10
    while await strikes.out("a"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_requests_past_the_limit_get_429_and_probes_do_not_count(predictor: Any, tmp_path: Path) -> None:
    keys = written(tmp_path / "keys", f"alice:{ALICE}\nbob:{BOB}\n")
    begin_early_in_a_minute()
    async with guarded(predictor, tmp_path, api_keys=keys, rate_limit=3) as client:
        for path in ("/v1/models/tiny", "/v2/health/ready", "/v1/models", "/v2/models/tiny") * 3:
            assert (await client.get(path, headers=bearer(ALICE))).status_code == 200
        asked: list[tuple[str, Any]] = [
            (PREDICT, body()),
            ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1}),
            ("/v1/jobs", body()),
            ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1}),
            (PREDICT, body()),
            ("/v1/jobs", body()),
        ]
        answers = [await client.post(path, json=sent, headers=bearer(ALICE)) for path, sent in asked]
        assert [answer.status_code for answer in answers] == [200, 200, 202, 429, 429, 429]
        for answer in answers[3:]:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"
        assert "at most 3 requests a minute" in answers[4].json()["error"]
        assert (await client.post(PREDICT, json=body(), headers=bearer(BOB))).status_code == 200


def _ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


# Ways to say one thing: (path, body). Ids with a special token among them read as the text without it.
WAYS: dict[str, tuple[str, Any]] = {
    "v1": (PREDICT, body(BAD)),
    "v1, second prompt": (PREDICT, {"instances": ["fine", {"prompt": BAD}]}),
    "v1, older body": (PREDICT, {"text": BAD}),
    "v1, base64": (PREDICT, {"instances": [{"b64": "c2F5IHRoZSBmb3JiaWRkZW4gd29yZA=="}]}),
    "v1, stream": (PREDICT, body(BAD, stream=True)),
    "openai": ("/v1/completions", {"model": "tiny", "prompt": ["fine", BAD], "max_tokens": 1}),
    "openai, ids": ("/v1/completions", {"model": "tiny", "prompt": _ids(BAD), "max_tokens": 1}),
    "openai, ids of a list": ("/v1/completions", {"model": "tiny", "prompt": [[1], _ids(BAD)], "max_tokens": 1}),
    "openai, ids with an end token": (
        "/openai/v1/completions",
        {"model": "tiny", "prompt": [*_ids("the forb"), 0, *_ids("idden word")], "max_tokens": 1},
    ),
    "openai, chat, a later turn": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "fine"}, {"role": "user", "content": ANCHORED}]},
    ),
    "openai, chat, a name": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "name": ANCHORED, "content": "fine"}]},
    ),
    "openai, chat, over two parts": (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": part} for part in ("the forbidden", "word")]}
            ],
        },
    ),
    "openai, chat": ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": BAD}]}),
    "a job of a chat": ("/v1/jobs", {"model": "tiny", "messages": [{"role": "user", "content": BAD}]}),
    "a job": ("/v1/jobs", body(BAD)),
    "a job of ids": ("/v1/jobs", {"model": "tiny", "prompt": _ids(BAD), "max_tokens": 1}),
    "v2": (
        "/v2/models/tiny/infer",
        {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [BAD]}]},
    ),
    "generate": ("/v2/models/tiny/generate", {"text_input": BAD}),
    "generate_stream": ("/v2/models/tiny/generate_stream", {"text_input": BAD}),
    "wide letters": (PREDICT, body("the \uff46\uff4f\uff52bidden word")),
    "an invisible character": (PREDICT, body("the for\u200bbidden word")),
    "an accent": (PREDICT, body("the forbi\u0301dden word")),
    "an end token within": (PREDICT, body("the forb<|endoftext|>idden word")),
    "system 2": ("/", {"prefix": BAD, "length": 1}),
    "system 3": ("/generate", {"text": {"plain": BAD}}),
    "system 4": ("/predict", {"data": {"ndarray": [BAD]}}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_banned_prompt_is_refused_in_every_format(way: str, predictor: Any, tmp_path: Path) -> None:
    path, sent = WAYS[way]
    before = REGISTRY.get_sample_value("predictor_strikes_total", {"revision": ""}) or 0
    async with guarded(predictor, tmp_path, banned=written(tmp_path / "banned", BANNED)) as client:
        refused = await client.post(path, json=sent)
        assert refused.status_code == 403, refused.text
        assert "banned_prompt" in refused.text
        assert BAD not in refused.text
        assert (await client.post(PREDICT, json=body())).status_code == 200
    assert REGISTRY.get_sample_value("predictor_strikes_total", {"revision": ""}) == before + 1


async def test_ids_that_no_token_has_are_the_formats_to_refuse(predictor: Any, tmp_path: Path) -> None:
    async with guarded(predictor, tmp_path, banned=written(tmp_path / "banned", BANNED)) as client:
        for ids in ([300], [2**31], [2**40], [2**70]):
            answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": ids})
            assert answer.status_code == 400, ids


async def test_too_many_strikes_shut_out_the_caller_alone(predictor: Any, tmp_path: Path) -> None:
    keys = written(tmp_path / "keys", f"alice:{ALICE}\nbob:{BOB}\n")
    banned = written(tmp_path / "banned", BANNED)
    async with guarded(predictor, tmp_path, api_keys=keys, banned=banned, strikes=2) as client:
        completion = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        codes = []
        for number in range(4):  # another user each time: the key is whose strike it is
            sent = completion | {"prompt": BAD, "user": f"user {number}"}
            answer = await client.post("/v1/completions", json=sent, headers=bearer(ALICE))
            assert answer.status_code == 403
            codes.append(answer.json()["error"]["code"])
        assert codes == ["banned_prompt"] * 2 + ["too_many_strikes"] * 2
        out = await client.post(PREDICT, json=body(), headers=bearer(ALICE))
        assert out.status_code == 403
        assert "too_many_strikes" in out.json()["error"]
        assert (await client.get("/v1/models/tiny", headers=bearer(ALICE))).status_code == 200
        assert (await client.post(PREDICT, json=body(), headers=bearer(BOB))).status_code == 200


async def test_without_keys_a_strike_is_the_users(predictor: Any, tmp_path: Path) -> None:
    banned = written(tmp_path / "banned", BANNED)
    async with guarded(predictor, tmp_path, banned=banned, strikes=1) as client:

        async def code(prompt: str, **more: Any) -> int:
            sent = {"model": "tiny", "prompt": prompt, "max_tokens": 1} | more
            return (await client.post("/v1/completions", json=sent)).status_code

        assert await code(BAD, user="eve") == 403
        assert await code("x", user="eve") == 403
        assert await code("x", user="frank") == 200
        assert await code("x") == 200
        assert await code(BAD) == 403
        assert await code("x") == 403
        assert await code("x", user="frank") == 200


async def test_changed_patterns_hold_at_once_and_broken_ones_change_nothing(predictor: Any, tmp_path: Path) -> None:
    path = tmp_path / "banned"
    async with guarded(predictor, tmp_path, banned=written(path, "one\n"), strikes=100) as client:

        async def refused(prompt: str) -> bool:
            return (await client.post(PREDICT, json=body(prompt))).status_code == 403

        assert await refused("one")
        assert not await refused("three")
        path.write_text("one\nthree\n")
        assert await refused("three")
        path.write_text("(\n")
        assert await refused("three")
        path.write_text("# nothing is banned now\n")
        assert not await refused("three")


def test_a_server_does_not_start_with_a_broken_pattern(tmp_path: Path, checkpoint: Path) -> None:
    banned = written(tmp_path / "banned", "fine\n(broken\n")
    with serving(tmp_path / "log", "--model", f"tiny={checkpoint}", "--banned", banned) as server:
        assert server.wait() == 1
    assert "error: --banned" in (tmp_path / "log").read_text()
    assert "line 2" in (tmp_path / "log").read_text()


def test_the_address_is_the_last_that_no_trusted_proxy_wrote(tmp_path: Path, checkpoint: Path) -> None:
    log = tmp_path / "log"
    with serving(log, "--model", f"tiny={checkpoint}", "--rate-limit", "2") as server:
        server.wait_until_ready("tiny")
        begin_early_in_a_minute()

        def asked(forwarded: str) -> int:
            return server.predict("tiny", body(), headers={"X-Forwarded-For": forwarded}).status_code

        assert [asked("203.0.113.7") for _ in range(3)] == [200, 200, 429]
        # What the client wrote stands on the left, what the proxies saw on the right.
        assert asked("198.51.100.1, 203.0.113.7") == 429
        assert asked("203.0.113.7, 198.51.100.1") == 200
        assert [asked(f"2001:db8:1:2::{k}") for k in range(3)] == [200, 200, 429]
        assert asked("2001:db8:1:3::1") == 200
        # Whatever no trusted proxy has seen is one caller.
        assert [asked(junk) for junk in ("garbage", "<x>", "unknown")] == [200, 200, 429]
        refused = httpx.post(
            f"{server.url}/v1/models/tiny:predict", json=body(), headers={"X-Forwarded-For": "garbage"}
        )
        assert int(refused.headers["retry-after"]) >= 1
        assert server.metric("predictor_refused_total", 'reason="rate_limit_exceeded"') >= 4
