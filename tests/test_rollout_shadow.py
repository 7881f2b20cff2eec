"""The shadow check over HTTP: two servers that answer as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from predictor.rollout.evidence import Shadow
from predictor.rollout.rules import ShadowRule
from predictor.rollout.shadow import ShadowUnavailable, compare
from tests.processes import free_port

RULE = ShadowRule.model_validate({"prompts": ["a", "b", "c"], "seed": 7, "max_new_tokens": 5})


class Version:
    """A version of the server; `asked` are the bodies that it got."""

    def __init__(self, status: int, answer: Any) -> None:
        self.status, self.answer, self.asked = status, answer, list[tuple[str, Any]]()
        self.url = ""


@contextmanager
def answering(answer: Any, status: int = 200) -> Iterator[Version]:
    version = Version(status, answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            version.asked.append((self.path, body))
            self.send_response(version.status)
            self.end_headers()
            self.wfile.write(json.dumps(version.answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        version.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield version
        server.shutdown()
        thread.join()


@pytest.fixture
def stable() -> Iterator[Version]:
    with answering({"predictions": ["x", "y", "z"]}) as version:
        yield version


def test_both_get_the_same_seeded_prompts(stable: Version) -> None:
    with answering({"predictions": ["x", "y", "z"]}) as canary:
        assert compare(RULE, "aitextgen", stable.url, canary.url + "/") == Shadow(3, 3)
    body = {"instances": ["a", "b", "c"], "parameters": {"seed": 7, "max_new_tokens": 5}}
    assert stable.asked == canary.asked == [("/v1/models/aitextgen:predict", body)]


def test_differences_are_counted_and_the_first_is_named(stable: Version) -> None:
    with answering({"predictions": ["x", "Y", "Z"]}) as canary:
        assert compare(RULE, "aitextgen", stable.url, canary.url) == Shadow(1, 3, "prompts[1]")


@pytest.mark.parametrize(
    ("status", "answer"), [(500, {}), (200, {"predictions": ["x"]}), (200, {}), (200, "no"), (200, [])]
)
def test_a_canary_that_does_not_answer_differs_in_all(stable: Version, status: int, answer: Any) -> None:
    with answering(answer, status) as canary:
        found = compare(RULE, "aitextgen", stable.url, canary.url)
    assert (found.equal, found.prompts) == (0, 3)
    assert "does not answer" in found.first_difference


@pytest.mark.parametrize(("status", "answer"), [(503, {}), (200, {"predictions": ["x"]}), (200, "no")])
def test_a_stable_version_that_does_not_answer_is_nothing_to_compare_with(status: int, answer: Any) -> None:
    with answering(answer, status) as stable, pytest.raises(ShadowUnavailable, match="the stable version at"):
        compare(RULE, "aitextgen", stable.url, stable.url)


def test_a_version_that_is_not_there_is_told_apart(stable: Version) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert compare(RULE, "aitextgen", stable.url, nowhere).equal == 0
    with pytest.raises(ShadowUnavailable):
        compare(RULE, "aitextgen", nowhere, stable.url)


def test_the_rules_addresses_come_before_the_revisions_own(stable: Version) -> None:
    rule = RULE.model_copy(update={"stable_url": stable.url, "canary_url": stable.url})
    assert compare(rule, "aitextgen", "http://127.0.0.1:1", None).equal == 3
    with pytest.raises(ShadowUnavailable, match="enable-tag-routing"):
        compare(RULE, "aitextgen", stable.url, None)
