"""HTTP below the protocols, on a real socket: what clients and attackers do to it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, left_out
from tests.processes import ServerProcess, serving

BODY = json.dumps({"instances": ["O"], "parameters": {"max_new_tokens": 2, "seed": 1}}).encode()
STREAM = json.dumps({"instances": ["O"], "parameters": {"max_new_tokens": 9, "seed": 1, "stream": True}}).encode()
PREDICT = "/v1/models/bard:predict"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("http") / "log", "--model", f"bard={ROOT}/models/bard") as running:
        running.wait_until_ready("bard")
        yield running


def exchanged(server: ServerProcess, request: bytes) -> bytes:
    """Send, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def posted(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {PREDICT} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_client_that_offers_http_2_keeps_its_body(server: ServerProcess, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        left_out("curl is not installed")
    (tmp_path / "body").write_bytes(BODY)
    command = ["curl", "--silent", "--http2", "--data", f"@{tmp_path}/body", server.url + PREDICT]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer == server.predict("bard", json.loads(BODY)).json()


def test_thousands_of_headers_do_not_hold_the_server(server: ServerProcess) -> None:
    answer = exchanged(server, posted(BODY, *(f"x-{n}: 1" for n in range(4_000))))
    assert answer.startswith(b"HTTP/1.1 200")


def test_headers_without_end_are_refused(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nx: ")
        sent, refused = 0, False
        while sent < 8 * 2**20 and not refused:
            try:
                sent += connection.send(b"a" * 65536)
                time.sleep(0.005)  # the answer comes while more is sent
            except OSError:
                refused = True
        assert refused, "8 MB of one header were taken"


def test_a_stream_to_http_1_0_is_plain_until_it_closes(server: ServerProcess) -> None:
    head, _, body = exchanged(server, posted(STREAM, version="1.0")).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"chunked" not in head.lower()
    events = [json.loads(line.removeprefix(b"data: ")) for line in body.split(b"\n\n") if line]
    assert events[-1]["finish_reason"] == "length"


def test_a_request_in_pieces_is_read_and_expectations_are_met(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head, body = posted(BODY, "Expect: 100-continue").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1024).startswith(b"HTTP/1.1 100")
        for place in range(0, len(body), 10):
            connection.sendall(body[place : place + 10])
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 200")
