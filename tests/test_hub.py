"""Hub ids: downloaded from a hub that runs in this process, found again without it, refused with what to do next."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

from predictor.checkpoints.load import read_config
from predictor.checkpoints.source import resolve
from predictor.errors import CheckpointError


@dataclass
class Hub:
    """What the stand-in serves: repository -> branch -> file -> bytes; and what it was asked."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        for branch in self.repositories[repository]:
            commit = hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        return next(
            files
            for branch, files in self.repositories[repository].items()
            if self.commit(repository, branch) == self.commit(repository, revision)
        )

    def downloaded(self) -> set[str]:
        return {path.rsplit("/", 1)[1] for method, path in self.asked if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    """The four routes of https://huggingface.co that a download asks: model, tree, HEAD and GET of a file."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.send(404, b"")

    def api(self, repository: str, rest: list[str]) -> None:
        kind, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if not self.found(repository, revision):
            return
        files, commit = self.hub.files(repository, revision), self.hub.commit(repository, revision)
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for name, raw in files.items()
            ]
            self.send(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in files]
            self.send(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())

    def file(self, repository: str, revision: str, name: str) -> None:
        if not self.found(repository, revision):
            return
        raw = self.hub.files(repository, revision).get(name)
        if raw is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        commit = self.hub.commit(repository, revision) or ""
        self.send(200, raw, {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": commit})

    def found(self, repository: str, revision: str) -> bool:
        if repository not in self.hub.repositories:
            # The real hub answers 401 to strangers, so as not to tell which private models there are.
            self.send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return False
        if self.hub.commit(repository, revision) is None:
            self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    clutter = {
        "README.md": b"# hello", "tf_model.h5": b"tensorflow", "flax_model.msgpack": b"flax", "64.tflite": b"lite",
        "onnx/decoder_model.onnx": b"onnx", "rust_model.ot": b"rust", "vocab.json": b"{}", "merges.txt": b"",
    }  # fmt: skip
    pickled = tmp_path_factory.mktemp("pickled") / "pytorch_model.bin"
    torch.save(load_file(checkpoint / "model.safetensors"), pickled)
    only_pickle = {name: raw for name, raw in files.items() if name != "model.safetensors"}
    only_pickle["pytorch_model.bin"] = pickled.read_bytes()
    clutter |= {"chat_template.jinja": b"{{ messages }}", "additional_chat_templates/tools.jinja": b"{{ tools }}"}
    older = files | {"config.json": files["config.json"].replace(b'"n_layer": 2', b'"n_layer":  2')}
    hub = Hub({
        "team/tiny": {"main": files | clutter | {"pytorch_model.bin": b"a second copy"}, "v1.0": older},
        "team/pickled": {"main": only_pickle},
        "team/empty": {"main": {"README.md": b"nothing here"}},
    })  # fmt: skip
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


# A subprocess each: huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE once, when it is imported.
RESOLVE = """
import json, sys
from predictor.checkpoints.source import resolve
from predictor.errors import CheckpointError
answers = []
for source, revision in json.loads(sys.argv[1]):
    try:
        folder = resolve(source, revision)
        answers.append([str(folder), sorted(path.name for path in folder.glob("*"))])
    except CheckpointError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

LOAD = """
import sys, torch
from predictor.checkpoints.load import load_gpt2, read_config
from predictor.checkpoints.source import resolve
from predictor.checkpoints.tokenizer import load_tokenizer
for source in sys.argv[1:]:
    folder = resolve(source)
    model = load_gpt2(folder, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder, model.config.vocabulary)
    print(model.config.layers, tokenizer.eos_token_id)
"""


def run_python(code: str, home: Path, endpoint: str, *arguments: str, **environment: str) -> str:
    mine = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    # A proxy of the machine must not stand between the test and its own server.
    others = {name: value for name, value in others.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=others | mine | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def resolve_there(home: Path, endpoint: str, *sources: tuple[str, str | None], **environment: str) -> list[Any]:
    """What `resolve` gives in a fresh process: [folder, its files], or the error's text."""
    return json.loads(run_python(RESOLVE, home, endpoint, json.dumps(sources), **environment))


NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens, connections are refused at once


@pytest.fixture(scope="module")
def cache(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], set[str]]:
    """A cache into which both models were downloaded; the answers; the files the hub was asked for."""
    home = tmp_path_factory.mktemp("hf")
    hub.asked.clear()
    answers = resolve_there(home, hub.url, ("team/tiny", None), ("team/pickled", None), ("team/tiny", "v1.0"))
    return home, answers, hub.downloaded()


def test_a_hub_id_is_downloaded_into_the_cache(cache: tuple[Path, list[Any], set[str]]) -> None:
    home, ((folder, files), *_), _ = cache
    assert Path(folder).is_relative_to(home)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert {"chat_template.jinja", "additional_chat_templates"} <= set(files)


def test_what_the_model_does_not_need_is_not_downloaded(cache: tuple[Path, list[Any], set[str]]) -> None:
    _, ((_, files), *_), downloaded = cache
    unneeded = {"README.md", "tf_model.h5", "flax_model.msgpack", "64.tflite", "decoder_model.onnx", "rust_model.ot"}
    assert not unneeded & downloaded
    # Of two copies of the weights, one.
    assert "pytorch_model.bin" not in files


def test_a_repository_with_only_a_pickle_is_downloaded_too(cache: tuple[Path, list[Any], set[str]]) -> None:
    _, (_, (_, files), _), _ = cache
    assert "pytorch_model.bin" in files
    assert "model.safetensors" not in files


def test_a_revision_is_a_folder_of_its_own(cache: tuple[Path, list[Any], set[str]], hub: Hub) -> None:
    _, ((main, _), _, (tagged, _)), _ = cache
    assert Path(tagged).name == hub.commit("team/tiny", "v1.0")
    assert Path(main).name == hub.commit("team/tiny", "main")
    assert b'"n_layer":  2' in (Path(tagged) / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("endpoint", "environment"),
    [(NOWHERE, {"HF_HUB_OFFLINE": "1"}), (NOWHERE, {})],
    ids=["told that it is offline", "hub cannot be reached"],
)
def test_what_is_in_the_cache_needs_no_hub(
    cache: tuple[Path, list[Any], set[str]], hub: Hub, endpoint: str, environment: dict[str, str]
) -> None:
    home, answers, _ = cache
    commit = hub.commit("team/tiny", "v1.0")
    again = resolve_there(
        home, endpoint, ("team/tiny", None), ("team/pickled", None), ("team/tiny", "v1.0"), ("team/tiny", commit),
        **environment,
    )  # fmt: skip
    assert again == [*answers, answers[2]]


def test_the_cached_folders_load_offline(cache: tuple[Path, list[Any], set[str]]) -> None:
    home, *_ = cache
    loaded = run_python(LOAD, home, NOWHERE, "team/tiny", "team/pickled", HF_HUB_OFFLINE="1")
    assert loaded.splitlines() == ["2 0", "2 0"]


def test_what_the_hub_lacks_is_told_clearly(hub: Hub, tmp_path: Path) -> None:
    unknown, revision, empty = resolve_there(
        tmp_path, hub.url, ("team/unknown", None), ("team/tiny", "no-such-branch"), ("team/empty", None)
    )
    assert unknown == "the hub has no model team/unknown, or it is private and HF_TOKEN is not set"
    assert "team/tiny" in revision
    assert "no-such-branch" in revision
    # A repository without a model is a folder without files, and loading it says what it lacks.
    folder, files = empty
    assert files == []
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(Path(folder))


@pytest.mark.parametrize(
    ("environment", "kind"), [({}, "unreachable"), ({"HF_HUB_OFFLINE": "1"}, "offline")], ids=["unreachable", "offline"]
)
def test_neither_cached_nor_reachable_is_told_with_what_to_do(
    tmp_path: Path, environment: dict[str, str], kind: str
) -> None:
    (message,) = resolve_there(tmp_path, NOWHERE, ("team/tiny", None), **environment)
    assert message.startswith("team/tiny is neither a folder nor in the local hub cache")
    assert "cannot be reached" in message
    assert "download it once" in message


@pytest.mark.parametrize(
    "source", ["team/tiny/extra", "/absolute/path", "./relative", "~nobody-here/x", "a b", "team/ti ny", "-x", "é/x"]
)
def test_what_cannot_be_a_hub_id_is_a_path_that_does_not_exist(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(source)


@pytest.mark.parametrize("source", ["team/a..b", "team/a--b", "team/a.git", "team/" + "a" * 200, "team/a."])
def test_what_the_hub_forbids_as_a_name_is_refused_without_asking(source: str) -> None:
    with pytest.raises(CheckpointError, match="team/a"):
        resolve(source)
