"""The Dockerfile without building it: hadolint, and what the manifests and the README promise of the image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from predictor.model.cuda import build
from tests.conftest import left_out

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@dataclass(frozen=True, slots=True)
class Stage:
    base: str
    instructions: tuple[tuple[str, str], ...]

    def values(self, keyword: str) -> list[str]:
        return [value for name, value in self.instructions if name == keyword]


def parse(text: str) -> tuple[dict[str, Stage], dict[str, str]]:
    """The stages by name, and the defaults of every ARG.

    Enough for our own file: each stage is named, and a line that ends in a backslash goes on.
    """
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage = ""
    for keyword, value in (line.split(maxsplit=1) for line in lines if line.strip()):
        if keyword == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default
        if keyword == "FROM":
            base, stage = value.split(" AS ")
            stages[stage] = Stage(base, ())
        elif stage:
            stages[stage] = Stage(stages[stage].base, (*stages[stage].instructions, (keyword, value)))
    return stages, arguments


STAGES, ARGUMENTS = parse(DOCKERFILE)


def test_hadolint_has_nothing_to_say() -> None:
    beside_python = Path(sys.executable).with_name("hadolint")
    hadolint = beside_python if beside_python.exists() else shutil.which("hadolint")
    if not hadolint:
        left_out("hadolint is not installed: the Dockerfile is not linted")
    result = subprocess.run(
        [str(hadolint), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_arguments_after_the_image_are_flags_of_serve(target: str) -> None:
    (entrypoint,) = STAGES[target].values("ENTRYPOINT")
    assert json.loads(entrypoint) == ["python", "-m", "predictor", "serve"]
    assert STAGES[target].values("CMD") == []
    assert STAGES[target].values("EXPOSE") == ["8080"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    (user,) = STAGES[target].values("USER")
    assert user.isdecimal()
    assert int(user) > 0


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_everything_that_is_written_goes_to_tmp(target: str) -> None:
    environment = dict(pair.split("=", 1) for value in STAGES[f"{target}-base"].values("ENV") for pair in value.split())
    assert environment["HOME"] == "/tmp"
    assert environment["HF_HOME"].startswith("/tmp/")
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_a_change_of_the_code_rebuilds_one_copy() -> None:
    with_code = {name for name, stage in STAGES.items() if "predictor predictor" in stage.values("COPY")}
    assert with_code == {"cpu", "gpu"}
    for target in with_code:
        assert STAGES[target].values("COPY")[-1] == "predictor predictor"
        assert STAGES[target].values("RUN") == []


def test_no_weights_reach_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "the list names what may come in, after shutting everything out"
    admitted = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in STAGES.values()
        for copy in stage.values("COPY")
        if not copy.startswith("--from=")
        for source in copy.split()[:-1]
    }
    copied = {source.split("/")[0] for source in copied}
    assert copied == admitted == {"constraints.txt", "pyproject.toml", "predictor"}
    assert all(stage.values("ADD") == [] for stage in STAGES.values())


def test_torch_is_the_version_of_pyproject_and_v100_has_kernels_in_it() -> None:
    pinned = re.search(r'"torch==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    for target in ("cpu", "gpu"):
        assert f"TORCH_VERSION={pinned[1]}" in STAGES[f"{target}-packages"].values("ARG")
    assert "TORCH_INDEX=" in STAGES["cpu-packages"].values("ARG")
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cu126" in STAGES["gpu-packages"].values("ARG")
    assert ARGUMENTS["CUDA_VERSION"].startswith("12.6.")


def test_our_cuda_kernels_are_compiled_for_v100_by_torchs_cuda_and_copied() -> None:
    kernels = STAGES["gpu-kernels"]
    assert kernels.base == STAGES["apex-on"].base
    assert "--architectures 70 " in kernels.values("RUN")[-1]
    folder = build.library_path().parent.relative_to(ROOT)
    assert f"--from=gpu-kernels /app/{folder} {folder}" in STAGES["gpu"].values("COPY")
    (sources,) = kernels.values("COPY")
    needed = {*build.sources(), *build.FOLDER.glob("*.cuh"), Path(build.__file__)}
    assert {path for pattern in sources.split()[:-1] for path in ROOT.glob(pattern)} == needed
    # What a developer has built, perhaps for other GPUs, stays out of the image.
    assert "**/build" in (ROOT / ".dockerignore").read_text().splitlines()


def test_both_targets_install_the_same_packages() -> None:
    assert STAGES["cpu-packages"].values("RUN")[-1] == STAGES["gpu-packages"].values("RUN")[-1]
    assert STAGES["cpu-base"].values("RUN") == STAGES["gpu-base"].values("RUN")
    assert STAGES["cpu-base"].values("ENV") == STAGES["gpu-base"].values("ENV")
    for keyword in ("USER", "EXPOSE", "ENTRYPOINT"):
        assert STAGES["cpu"].values(keyword) == STAGES["gpu"].values(keyword)


def test_every_base_has_a_fixed_tag() -> None:
    for name, stage in STAGES.items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: ARGUMENTS[match[1]], stage.base)
        assert base in STAGES or re.fullmatch(r"[a-z./-]+:\d+\.\d+[\w.-]*", base), f"{name}: {base}"


def test_apex_is_off_until_asked_for_and_pinned_to_a_commit() -> None:
    assert ARGUMENTS["APEX"] == "off"
    assert STAGES["gpu-venv"].base == "apex-${APEX}"
    assert STAGES["apex-off"] == Stage("gpu-packages", ())
    assert re.fullmatch(r"[0-9a-f]{40}", ARGUMENTS["APEX_COMMIT"])
    build = " ".join(STAGES["apex-on"].values("ENV"))
    for setting in ('TORCH_CUDA_ARCH_LIST="7.0;8.0;9.0"', "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1"):
        assert setting in build
