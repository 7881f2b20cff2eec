"""The server as a process: its start, its end, and what a client's leaving does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import ROOT, left_out
from tests.processes import ServerProcess, free_port, serving, wait_for

BARD = ROOT / "models" / "bard"

# Seconds of work on a 2-core machine, and more sequences than run at once.
LONG = {"instances": ["O"] * 24, "parameters": {"max_new_tokens": 200, "n": 4, "ignore_eos": True}}

# A minute and a half of it: whatever ends sooner was ended.
ENDLESS = {"instances": ["O"] * 64, "parameters": {"max_new_tokens": 250, "n": 16, "ignore_eos": True}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture(scope="module")
def bard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("bard") / "log"
    with serving(log, "--model", f"aitextgen={BARD}", K_REVISION="aitextgen-predictor-00007") as server:
        server.wait_until_ready("aitextgen")
        yield server


def test_the_sample_by_curl_as_typed(bard: ServerProcess) -> None:
    if shutil.which("curl") is None:
        left_out("curl is not installed")
    command = ["curl", "-s", "-d", "@sample.json", f"{bard.url}/v1/models/aitextgen:predict"]
    answer = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    (text,) = answer["predictions"]
    words = text.lower().split()
    assert len(words) > 10
    assert {"the", "and", "i", "my", "to", "of", "thou", "you"} & set(words), "it does not read like Shakespeare"


async def test_kserves_own_client_speaks_v1(bard: ServerProcess) -> None:
    from kserve import InferenceRESTClient, RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v1", timeout=60))
    assert await client.is_model_ready(bard.url, "aitextgen")
    asked = {"instances": ["To be"], "parameters": {"max_new_tokens": 3, "seed": 1}}
    answer = await client.infer(bard.url, asked, model_name="aitextgen")
    assert answer == bard.predict("aitextgen", asked).json()
    await client.close()


def test_one_port_only(bard: ServerProcess) -> None:
    connections = psutil.Process(bard.process.pid).connections()
    assert [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN] == [bard.port]


def test_details_and_metrics_tell_the_width_in_use(bard: ServerProcess) -> None:
    body = {"instances": ["x"], "parameters": {"details": True, "max_new_tokens": 2}}
    (told,) = bard.predict("aitextgen", body).json()["predictions"]
    assert told["dtype"] == "float32"
    (line,) = [line for line in bard.get("/metrics").text.splitlines() if line.startswith("predictor_model_info{")]
    for label in ('model_name="aitextgen"', 'backend="engine"', 'dtype="float32"', 'device="cpu"'):
        assert label in line


def test_every_metric_of_ours_names_the_revision_that_knative_gives(bard: ServerProcess) -> None:
    lines = [line for line in bard.get("/metrics").text.splitlines() if line.startswith("predictor_")]
    assert lines
    assert [line for line in lines if 'revision="aitextgen-predictor-00007"' not in line] == []


def test_a_client_that_leaves_frees_its_sequences(bard: ServerProcess) -> None:
    body = json.dumps(ENDLESS).encode()
    with socket.create_connection(("127.0.0.1", bard.port)) as connection:
        connection.sendall(
            b"POST /v1/models/aitextgen:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_for(lambda: bard.metric("predictor_requests_running") > 0)
    wait_for(lambda: bard.metric("predictor_requests_running") == bard.metric("predictor_requests_waiting") == 0)
    assert bard.metric("predictor_kv_tokens_used") == 0


def test_probes_answer_while_the_engine_works(bard: ServerProcess) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bard.predict, "aitextgen", LONG)
        wait_for(lambda: bard.metric("predictor_requests_running") > 0)
        for path in ("/", "/v1/models/aitextgen", "/v2/health/live", "/v2/health/ready"):
            assert bard.get(path).status_code == 200
        assert answer.result().status_code == 200


class StallingHub(BaseHTTPRequestHandler):
    """A hub that lists its files and then does not send them: a load that lasts as long as the test likes."""

    released = threading.Event()
    asked_for_a_file = threading.Event()

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]
            listing = {"id": "somebody/large", "sha": "0" * 40, "siblings": files, "tags": [], "private": False}
            body = json.dumps(listing | {"lastModified": "2026-01-01T00:00:00.000Z"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.asked_for_a_file.set()
        self.released.wait(60)
        self.send_error(503)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "1000000")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stalling_hub() -> Iterator[str]:
    StallingHub.released.clear()
    StallingHub.asked_for_a_file.clear()
    hub = ThreadingHTTPServer(("127.0.0.1", 0), StallingHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hub.server_port}"
    StallingHub.released.set()
    hub.shutdown()
    hub.server_close()


def test_the_port_is_open_while_loading_and_says_503(log: Path, tmp_path: Path, stalling_hub: str) -> None:
    flags = ("--model", "aitextgen=somebody/large")
    with serving(log, *flags, HF_ENDPOINT=stalling_hub, HF_HOME=str(tmp_path)) as server:
        server.wait_for_port(15)
        for path in ("/v1/models/aitextgen", "/v2/health/ready", "/v2/models/aitextgen/ready"):
            answer = server.get(path)
            assert (answer.status_code, next(iter(answer.json()))) == (503, "error")
            assert int(answer.headers["retry-after"]) > 0
        refused = server.predict("aitextgen", {"instances": ["a"]})
        assert refused.status_code == 503
        assert "loading" in refused.json()["error"]
        assert refused.headers["retry-after"]
        assert server.get("/v2/health/live").status_code == 200
        assert StallingHub.asked_for_a_file.wait(30), log.read_text()
        server.terminate()
        assert server.wait(20) == 0, "it waited for the hub, which answers after 60 s"
        assert "Traceback" not in log.read_text()


def catches_sigterm(pid: int) -> bool:
    """Whether a handler stands: without one the kernel ends the process, or, in a container, drops the signal."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_sigterm_in_the_first_instant_ends_with_0(log: Path) -> None:
    for delay_s in (0.0, 0.3, 0.6, 1.5):
        with serving(log, "--model", f"aitextgen={BARD}") as server:
            wait_for(lambda server=server: catches_sigterm(server.process.pid))
            time.sleep(delay_s)
            server.terminate()
            assert server.wait(20) == 0, f"after {delay_s} s:\n{log.read_text()}"
            assert "Traceback" not in log.read_text()


def test_sigterm_while_a_library_loads_ends_with_0(log: Path) -> None:
    for delay_s in (2.5, 3.0, 3.5, 4.0):
        with serving(log, "--model", f"aitextgen={BARD}", "--backend", "transformers") as server:
            time.sleep(delay_s)
            server.terminate()
            assert server.wait(20) == 0, f"after {delay_s} s:\n{log.read_text()}"


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(bard: ServerProcess) -> None:
    left = bard.metric("predictor_requests_total", 'code="499"')
    with socket.create_connection(("127.0.0.1", bard.port)) as connection:
        connection.sendall(b"POST /v1/models/aitextgen:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        time.sleep(0.2)
    wait_for(lambda: bard.metric("predictor_requests_total", 'code="499"') == left + 1)
    assert bard.metric("predictor_requests_total", 'code="500"') == 0


def test_an_upload_that_stalls_is_told_of_the_shutdown(log: Path) -> None:
    with serving(log, "--model", f"aitextgen={BARD}") as server:
        server.wait_until_ready("aitextgen")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST /v1/models/aitextgen:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"
            )
            time.sleep(0.3)
            server.terminate()
            answer = connection.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 503")
        assert answer.rstrip().endswith('{"error":"the server is shutting down; send the request again"}')
        assert server.wait(20) == 0
        assert "Traceback" not in log.read_text()


def test_a_large_answer_holds_up_nobody(bard: ServerProcess) -> None:
    each = {"n": 16, "logprobs": 20, "details": True, "max_new_tokens": 90, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bard.predict, "aitextgen", {"instances": ["O"] * 8, "parameters": each})
        while not answer.done():
            assert bard.get("/v1/models/aitextgen").status_code == 200
        assert len(answer.result().json()["predictions"][7][15]["logprobs"]["top_logprobs"]) == 90


@pytest.mark.parametrize(("command", "code"), [("serve", 0), ("finetune", 143), ("generate", 143)])
def test_only_a_server_that_is_stopped_has_done_its_work(tmp_path: Path, command: str, code: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 500)
    flags = {
        "serve": ["--host", "127.0.0.1", "--port", str(free_port())],
        "finetune": ["--data", str(text), "--out", str(tmp_path / "out")],
        "generate": ["O", "--max-new-tokens", "250"],
    }
    process = subprocess.Popen([sys.executable, "-m", "predictor", command, *flags[command]], cwd=ROOT)
    wait_for(lambda: catches_sigterm(process.pid))
    process.terminate()
    assert process.wait(30) == code


def test_a_huge_list_of_banned_words_holds_up_nobody(bard: ServerProcess) -> None:
    words = [f"{number:03}" + "thou art not " * 18 for number in range(256)]
    asked = {"instances": ["O"] * 64, "parameters": {"bad_words": words, "max_new_tokens": 2, "timeout_s": 20}}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(bard.predict, "aitextgen", asked)
        while not answer.done():
            assert bard.get("/v1/models/aitextgen").status_code == 200
        assert answer.result().status_code == 200


def test_sigterm_finishes_what_runs(log: Path) -> None:
    with serving(log, "--model", f"aitextgen={BARD}") as server, ThreadPoolExecutor() as pool:
        server.wait_until_ready("aitextgen")
        answer = pool.submit(server.predict, "aitextgen", LONG)
        wait_for(lambda: server.metric("predictor_requests_running") > 0)
        server.terminate()
        response = answer.result()
        assert response.status_code == 200
        assert len(response.json()["predictions"]) == 24
        assert server.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            server.get("/")


def test_what_outlasts_the_grace_is_answered_and_the_exit_is_0(log: Path) -> None:
    flags = ("--model", f"aitextgen={BARD}", "--grace-period-s", "2", "--max-running", "2")
    with serving(log, *flags) as server, ThreadPoolExecutor() as pool:
        server.wait_until_ready("aitextgen")
        answer = pool.submit(server.predict, "aitextgen", ENDLESS)
        wait_for(lambda: server.metric("predictor_requests_running") > 0)
        server.terminate()
        response = answer.result()
        assert response.status_code == 503
        assert "shutting down" in response.json()["error"]
        assert response.headers["retry-after"]
        assert server.wait(20) == 0


def test_past_the_queue_limit_429_with_retry_after(log: Path) -> None:
    flags = ("--model", f"aitextgen={BARD}", "--max-running", "1", "--queue-limit", "2", "--kv-memory-mib", "4")
    one = {"instances": ["O"], "parameters": {"max_new_tokens": 250, "ignore_eos": True}}
    with serving(log, *flags) as server, ThreadPoolExecutor(max_workers=12) as pool:
        server.wait_until_ready("aitextgen")
        answers = [each.result() for each in [pool.submit(server.predict, "aitextgen", one) for _ in range(12)]]
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 2
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) > 0
                assert "queue" in answer.json()["error"]


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (["--model", "aitextgen=/no/such/folder"], {}, "/no/such/folder does not exist"),
        (["--model", "nonsense"], {}, "--model must be NAME=SOURCE"),
        (["--port", "70000"], {}, "--port"),
        (["--device", "tpu"], {}, "tpu"),
        (["--device", "cuda"], {}, "CUDA"),
        (["--backend", "aitextgen"], {}, "make aitextgen-env"),
        (["--kv-memory-mib", "1"], {}, "--kv-memory-mib"),
        (["--kv-memory-mib", "900000000"], {}, "the model needs"),
        (["--kv-memory-mib", "64", "--backend", "transformers"], {}, "does nothing with --backend transformers"),
        (["--model", "a=b", "--model", "a=d"], {}, "--model"),
        ([], {"PREDICTOR_PROT": "1"}, "did you mean PREDICTOR_PORT?"),
        ([], {"PREDICTOR_DTYPE": "int3"}, "PREDICTOR_DTYPE"),
        ([], {"PREDICTOR_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks"),
    ],
    ids=str,
)
def test_a_start_that_cannot_work_is_one_line_and_exit_1(
    log: Path, flags: list[str], variables: dict[str, str], said: str
) -> None:
    with serving(log, *flags, **variables) as server:
        assert server.wait(60) == 1
        text = log.read_text()
        assert said in text
        assert "Traceback" not in text


def test_a_port_in_use_is_said(log: Path, bard: ServerProcess) -> None:
    command = [sys.executable, "-m", "predictor", "serve", "--host", "127.0.0.1", "--port", str(bard.port)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_variable_sets_what_a_flag_would(log: Path) -> None:
    variables = {"PREDICTOR_MODEL": f"bard={BARD}", "PREDICTOR_MAX_INSTANCES": "2", "PREDICTOR_LOG_FORMAT": "json"}
    with serving(log, **variables) as server:
        server.wait_until_ready("bard")
        assert "at most 2" in server.predict("bard", {"instances": ["a"] * 3}).json()["error"]
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        logged = [json.loads(line) for line in lines]
        assert any(line["message"] == "answered" and line["code"] == 400 for line in logged)


def test_generate_streams_in_the_terminal() -> None:
    flags = ["--seed", "1", "--max-new-tokens", "12", "--n", "2"]
    command = [sys.executable, "-m", "predictor", "generate", "To be", *flags]
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("--- seed 1\nTo be")
    assert "--- seed 2\nTo be" in first.stdout


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["finetune"]], ids=str)
def test_help_is_help(command: list[str]) -> None:
    environment = os.environ | {"COLUMNS": "200"}
    whole = [sys.executable, "-m", "predictor", *command, "--help"]
    shown = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0
    assert "Usage:" in shown.stdout
