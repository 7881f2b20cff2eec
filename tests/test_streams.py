"""Server-sent events from a real process: they come one by one, outlive SIGTERM, and end with an error that is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.processes import ServerProcess, serving

PREDICT = "/v1/models/bard:predict"

# Some seconds of tokens on a 2-core machine.
LONG = {"max_new_tokens": 250, "ignore_eos": True, "stream": True, "n": 8}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def stream(server: ServerProcess, rows: int = 1, **parameters: Any) -> Iterator[dict[str, Any]]:
    body = {"instances": ["O"] * rows, "parameters": LONG | parameters}
    with httpx.stream("POST", server.url + PREDICT, json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))


def test_events_come_while_others_are_still_made(log: Path) -> None:
    with serving(log, "--model", f"bard={ROOT}/models/bard") as server:
        server.wait_until_ready("bard")
        began = time.monotonic()
        arrived = [time.monotonic() - began for _ in stream(server, n=1)]
        assert len(arrived) > 100
        assert arrived[0] < arrived[-1] / 2, "the first came long before the last"


def test_a_stream_that_runs_at_sigterm_is_finished(log: Path) -> None:
    with serving(log, "--model", f"bard={ROOT}/models/bard", "--grace-period-s", "60") as server:
        server.wait_until_ready("bard")
        events = stream(server)
        first = next(events)
        server.terminate()
        rest = list(events)
        assert sum("finish_reason" in event for event in [first, *rest]) == 8
        assert not any("error" in event for event in rest)
        assert server.wait() == 0


def test_a_stream_past_the_grace_period_ends_with_an_error(log: Path) -> None:
    with serving(log, "--model", f"bard={ROOT}/models/bard", "--grace-period-s", "6") as server:
        server.wait_until_ready("bard")
        events = stream(server, rows=64, n=16)
        next(events)
        server.terminate()
        *_, last = events
        assert "shutting down" in last["error"]
        assert server.wait() == 0
        assert "Traceback" not in log.read_text()


def test_a_deadline_in_the_middle_is_the_last_event_and_counted(log: Path) -> None:
    with serving(log, "--model", f"bard={ROOT}/models/bard") as server:
        server.wait_until_ready("bard")
        *_, last = stream(server, rows=64, n=16, timeout_s=1.5)
        assert "1.5 s" in last["error"]
        assert server.metric("predictor_requests_total", 'code="504"') == 1
        assert server.metric("predictor_completion_tokens_total") > 0
