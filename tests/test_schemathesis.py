"""schemathesis over the OpenAPI document, against a real server: no 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.processes import serving

# Per operation and phase: some 30 operations in about a minute.
_EXAMPLES = 20


def test_no_request_of_schemathesis_is_our_fault(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--model", f"tiny={checkpoint}", "--jobs", f"sqlite:///{tmp_path}/jobs.db"]
    with serving(tmp_path / "log", *flags) as server:
        server.wait_until_ready("tiny")
        run = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
        options = ["--checks", "not_a_server_error", "--max-examples", str(_EXAMPLES), "--generation-deterministic"]
        done = subprocess.run([*run, *options], capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.get("/v1/models/tiny").status_code == 200
        told = server.get("/openapi.json").json()
    operations = sum(len(methods) for methods in told["paths"].values())
    assert f"Tested: {operations}" in done.stdout, done.stdout
