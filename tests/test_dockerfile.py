"""The Dockerfile without building it: hadolint, and what the manifests and the README promise of the image.

tests/test_image.py builds it.
"""

from __future__ import annotations

import json
import os
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
        if keyword == "ARG" and "=" in value:
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
    assert STAGES[target].base == f"{target}-packages"
    assert STAGES[f"{target}-packages"].base == "base"
    environment = dict(pair.split("=", 1) for value in STAGES["base"].values("ENV") for pair in value.split())
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
    assert ARGUMENTS["TORCH_VERSION"] == pinned[1]
    for target in ("cpu", "gpu"):
        assert "TORCH_VERSION" in STAGES[f"{target}-packages"].values("ARG"), "an ARG before FROM is unset after it"
    assert "TORCH_INDEX=" in STAGES["cpu-packages"].values("ARG")
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cu126" in STAGES["gpu-packages"].values("ARG")
    assert "TORCH_CUDA=12.6" in STAGES["gpu-packages"].values("ARG")
    assert re.search(r"cuda:12\.6\.\d+-devel-", ARGUMENTS["CUDA_IMAGE"])


def test_our_cuda_kernels_are_compiled_for_v100_by_torchs_cuda_and_copied() -> None:
    kernels = STAGES["gpu-kernels"]
    assert kernels.base == "cuda"
    assert "/cuda-12.6/bin/nvcc --architectures 70 " in kernels.values("RUN")[-1]
    folder = build.library_path().parent.relative_to(ROOT)
    assert f"--from=gpu-kernels /app/{folder} {folder}" in STAGES["gpu"].values("COPY")
    (sources,) = kernels.values("COPY")
    needed = {*build.sources(), *build.FOLDER.glob("*.cuh"), Path(build.__file__)}
    assert {path for pattern in sources.split()[:-1] for path in ROOT.glob(pattern)} == needed
    # What a developer has built, perhaps for other GPUs, stays out of the image.
    assert "**/build" in (ROOT / ".dockerignore").read_text().splitlines()


def test_both_targets_install_the_same_packages_and_run_alike() -> None:
    cpu, gpu = STAGES["cpu-packages"], STAGES["gpu-packages"]
    assert gpu.values("RUN")[:2] == cpu.values("RUN")
    assert gpu.values("COPY") == cpu.values("COPY")
    for keyword in ("USER", "EXPOSE", "ENTRYPOINT", "ARG", "LABEL"):
        assert STAGES["cpu"].values(keyword) == STAGES["gpu"].values(keyword)


def test_only_nvcc_needs_nvidias_registry() -> None:
    outside = {name: stage.base for name, stage in STAGES.items() if stage.base not in STAGES}
    assert outside == {"base": "${BASE}", "cuda": "${CUDA_IMAGE}"}


def test_every_base_has_a_fixed_tag() -> None:
    for name in ("BASE", "CUDA_IMAGE"):
        assert re.fullmatch(r"[a-z./-]+:\d+\.\d+[\w.-]*", ARGUMENTS[name]), name


def test_bases_are_pinned_by_digest_and_the_images_then_built_on_those(tmp_path: Path) -> None:
    """`make image-digests` with a skopeo that answers for the registry."""
    for name in ("Makefile", "Dockerfile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    digest = "sha256:" + "5" * 64
    skopeo = tmp_path / "bin" / "skopeo"
    skopeo.parent.mkdir()
    skopeo.write_text(f"#!/bin/sh\necho $4 >> asked\necho {digest}\n")
    skopeo.chmod(0o755)
    environment = os.environ | {"PATH": f"{skopeo.parent}:{os.environ['PATH']}"}

    def make(*arguments: str) -> str:
        return subprocess.run(
            ["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    make("image-digests")
    tags = [ARGUMENTS["BASE"], ARGUMENTS["CUDA_IMAGE"]]
    assert (tmp_path / "asked").read_text().split() == [f"docker://{tag}" for tag in tags]
    base, cuda = (f"{tag.rpartition(':')[0]}@{digest}" for tag in tags)
    for target in ("image-cpu", "image-gpu"):
        command = make("--dry-run", target)
        assert f"--build-arg BASE={base} " in command
        assert f"--build-arg CUDA_IMAGE={cuda} " in command
    assert "--build-arg BASE=mine " in make("--dry-run", "image-cpu", "BASE=mine")


def test_apex_is_in_a_target_of_its_own_and_pinned_to_a_commit() -> None:
    assert STAGES["gpu-apex"].base == "gpu"
    assert STAGES["gpu-apex"].values("USER")[-1] == STAGES["gpu"].values("USER")[-1]
    assert {name for name, stage in STAGES.items() if "apex" in str(stage.instructions)} == {"apex-wheel", "gpu-apex"}
    assert re.fullmatch(r"[0-9a-f]{40}", ARGUMENTS["APEX_COMMIT"])
    settings = " ".join(STAGES["apex-wheel"].values("ENV"))
    for setting in ('TORCH_CUDA_ARCH_LIST="7.0;8.0;9.0"', "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1"):
        assert setting in settings
