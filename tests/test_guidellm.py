"""GuideLLM, an OpenAI client that measures servers, finds nothing missing here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.conftest import ROOT, left_out
from tests.processes import serving

BARD = ROOT / "models" / "bard"
GUIDELLM = ROOT / ".venv-guidellm" / "bin" / "guidellm"
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 12, 16, 8


def test_a_run_of_guidellm_has_no_errors(tmp_path: Path) -> None:
    if not GUIDELLM.exists():
        left_out("GuideLLM is not installed: make guidellm-env")
    report = tmp_path / "report.json"
    flags = ["--model", f"bard={BARD}", "--jobs", f"sqlite:///{tmp_path}/jobs"]
    with serving(tmp_path / "log", *flags) as server:
        server.wait_until_ready("bard")
        command = [
            *(str(GUIDELLM), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={server.url},request_format=/v1/completions"),
            *("--profile", "kind=concurrent,streams=3"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
            *("--tokenizer", f"kind=hf_auto,model={BARD}"),
            *("--output", f"kind=json,path={report}"),
        ]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        generated = server.metric("predictor_completion_tokens_total")
    (run,) = json.loads(report.read_text())["benchmarks"]
    assert run["metrics"]["request_totals"] == {
        "successful": REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": REQUESTS,
    }
    tokens = {
        (each["input_metrics"]["text_tokens"], each["output_metrics"]["text_tokens"])
        for each in run["requests"]["successful"]
    }
    assert tokens == {(PROMPT_TOKENS, OUTPUT_TOKENS)}
    assert generated == REQUESTS * OUTPUT_TOKENS
    first_token = run["metrics"]["time_to_first_token_ms"]["successful"]["mean"]
    assert 0 < first_token < run["metrics"]["request_latency"]["successful"]["mean"] * 1000
