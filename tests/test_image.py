"""The image, really built and run: what is in it and what is not, how it starts, serves and stops."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.cuda_toolkit import make_toolkit
from tests.images import Container, Podman, copy_of_the_tree, run, running
from tests.processes import wait_for
from tests.test_process import BARD, LONG

# The first build on a machine takes minutes.
pytestmark = pytest.mark.timeout(1500)

IMAGE = "gpt2-predictor-test"
REVISION = "0" * 40
VOLUME = ("--volume", f"{BARD}:/mnt/models:ro")
FLAGS = ("--model", "aitextgen=/mnt/models")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    return Podman(tmp_path_factory.mktemp("podman"))


@pytest.fixture(scope="module")
def base(podman: Podman) -> str:
    return podman.base()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_tree(tmp_path_factory.mktemp("tree"))


def make(podman: Podman, tree: Path, target: str, *build_flags: str, **variables: str) -> None:
    flags = " ".join([*podman.build_flags, *build_flags])
    given = {"CONTAINER": "podman", "BUILD_FLAGS": flags, "IMAGE": IMAGE, "REVISION": REVISION} | variables
    run(["make", target, *(f"{name}={value}" for name, value in given.items())], podman.environment, tree)


@pytest.fixture(scope="module")
def image(podman: Podman, base: str, tree: Path, version: str) -> str:
    """`make image-cpu`, as anybody would, on a base that needs no registry."""
    make(podman, tree, "image-cpu", BASE=base)
    return f"localhost/{IMAGE}:{version}-cpu"


@pytest.fixture(scope="module")
def version() -> str:
    (found,) = re.findall(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    return str(found)


@pytest.fixture(scope="module")
def files(podman: Podman, image: str) -> Iterator[Path]:
    with podman.mounted(image) as root:
        yield root


@pytest.fixture(scope="module")
def server(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(podman, log, image, *FLAGS, options=VOLUME) as container:
        container.wait_until_ready("aitextgen")
        yield container


def inspect(podman: Podman, image: str) -> dict[str, Any]:
    (told,) = json.loads(podman("image", "inspect", image))
    return dict(told)


def python(podman: Podman, image: str, code: str) -> str:
    return podman("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", code).strip()


# ---------------------------------------------------------------------------------------------------- what is in it


def test_the_size_is_told_and_bounded(
    podman: Podman, image: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = next(files.glob("opt/venv/lib/python3*/site-packages"))
    torch = sum(
        path.lstat().st_size
        for name in ("torch", "nvidia", "triton", "cuda")  # the last three where pip's torch is a CUDA build
        for path in (packages / name).rglob("*")
    )
    whole = inspect(podman, image)["Size"]
    with capsys.disabled():
        print(f"\nthe CPU image: {whole / 1e6:.0f} MB, of which torch {torch / 1e6:.0f} MB")
    # Measured: 0.19 GB of Debian and Python, 0.7 GB of packages without torch (kserve's own take most of it).
    # A compiler left behind is 0.3 GB more, a second copy of the packages 0.7 GB.
    assert whole - torch < 1.1e9


def test_every_file_of_the_package_is_in_it_and_neither_tests_nor_models(tree: Path, files: Path) -> None:
    ours = {path.relative_to(tree) for path in (tree / "predictor").rglob("*") if path.is_file()}
    there = {path.relative_to(files / "app") for path in (files / "app").rglob("*") if path.is_file()}
    assert ours - there == set()
    added = {str(path) for path in there - ours}
    kernels = {name for name in added if re.fullmatch(r"predictor/model/cpu/build/gpt2-[0-9a-f]{16}\.so", name)}
    assert len(kernels) == 1
    assert added - kernels == {"constraints.txt", "requirements.txt"}


def test_no_compiler_and_no_weights_are_in_it(files: Path) -> None:
    tools = re.compile(r"(.*-)?(gcc|g\+\+|c\+\+|cc|clang|nvcc|ld|make|cmake|ninja|git|curl|wget)(-[\d.]+)?")
    folders = [files / "usr" / name for name in ("bin", "sbin", "local/bin")] + [files / "opt/venv/bin"]
    assert [path.name for folder in folders for path in folder.iterdir() if tools.fullmatch(path.name)] == []
    formats = {".safetensors", ".gguf", ".ckpt", ".pt", ".onnx", ".h5", ".bin"}
    of_weights = [path for path in files.rglob("*") if path.suffix in formats and path.is_file()]
    # torch brings a .pt of 7 kB that it tests itself with.
    assert [path for path in of_weights if path.stat().st_size > 100_000] == []


def test_what_enters_the_build_is_the_package_and_two_files(podman: Podman, tmp_path: Path) -> None:
    """Of the whole working tree, environments, history and weights included, by a copy of all that is admitted."""
    everything = tmp_path / "Dockerfile"
    everything.write_text("FROM scratch\nCOPY . /\n")
    podman("build", f"--file={everything}", f"--tag={IMAGE}:context", str(ROOT))
    with podman.mounted(f"{IMAGE}:context") as root:
        found = [path for path in root.rglob("*") if path.is_file()]
        assert {path.relative_to(root).parts[0] for path in found} == {"predictor", "pyproject.toml", "constraints.txt"}
        assert [path for path in found if path.suffix in {".so", ".pyc"}] == []
        assert sum(path.stat().st_size for path in found) < 3e6  # 0.6 MB of sources; the bundled model alone is 7.5 MB


def test_labels_say_what_it_is(podman: Podman, image: str, version: str) -> None:
    labels = inspect(podman, image)["Labels"]
    assert labels["org.opencontainers.image.title"] == "gpt2-predictor"
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.revision"] == REVISION


def test_nothing_of_the_machine_that_built_it_is_in_any_layer(podman: Podman, image: str, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    podman("save", "--output", str(archive), image)
    names: set[str] = set()
    with tarfile.open(archive) as saved:
        layers = [member for member in saved.getmembers() if member.name.endswith(".tar") and member.isfile()]
        for layer in layers:
            with tarfile.open(fileobj=saved.extractfile(layer)) as opened:
                names |= {name.removeprefix("./") for name in opened.getnames()}
        configuration = b"".join(
            saved.extractfile(member).read()  # type: ignore[union-attr]
            for member in saved.getmembers()
            if member.name.endswith(".json") and member.isfile()
        ).decode()
    archive.unlink()
    assert len(layers) == len(inspect(podman, image)["RootFS"]["Layers"])
    assert {"app/predictor/__main__.py", "opt/venv/bin/python"} <= names
    left = re.compile(r"(.*/)?pip\.conf|(tmp|mnt|root/\.\w+|var/lib/apt/lists|var/cache/apt/archives)/.+")
    empty = {
        f"var/{folder}/{name}" for folder in ("lib/apt/lists", "cache/apt/archives") for name in ("partial", "lock")
    }
    assert {name for name in names if left.fullmatch(name)} - empty == set()
    # Debian's own wheels, of which python3-venv puts pip into an environment, are all there are.
    wheels = {str(Path(name).parent) for name in names if name.endswith(".whl")}
    assert wheels <= {"usr/share/python-wheels"}
    assert [source for source in podman.pip_sources if str(source).lstrip("/") + "/" in "\n".join(names)] == []
    assert [source for source in podman.pip_sources if str(source) in configuration] == []


def test_it_trusts_the_authorities_of_debian_and_no_others(files: Path) -> None:
    def certificates(text: str) -> set[str]:
        return set(re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, re.DOTALL))

    debian = {
        one
        for path in (files / "usr/share/ca-certificates").rglob("*.crt")
        for one in certificates(path.read_text().replace("\r", ""))
    }
    assert len(debian) > 50
    assert certificates((files / "etc/ssl/certs/ca-certificates.crt").read_text()) <= debian
    assert not any((files / "usr/local/share/ca-certificates").glob("*"))


def test_the_sbom_lists_debian_and_python_packages(podman: Podman, image: str, tree: Path, version: str) -> None:
    make(podman, tree, "sbom", SBOM_VENV=str(ROOT / ".venv-sbom"))
    sbom = json.loads((tree / "build" / f"{IMAGE}-{version}-cpu.cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {(one["purl"].split("/")[0], one["name"], one["version"]) for one in sbom["components"] if "purl" in one}
    code = "import importlib.metadata as m; print(*{f'{d.name} {d.version}' for d in m.distributions()}, sep='\\n')"
    installed = {tuple(line.split()) for line in python(podman, image, code).splitlines()}
    assert {"torch", "kserve", "transformers"} <= {name for name, _ in installed}

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    of_python = {(plain(name), release) for kind, name, release in listed if kind == "pkg:pypi"}
    assert {(plain(name), release) for name, release in installed} - of_python == set()
    query = ["--entrypoint=dpkg-query", image, "--show", "--showformat=${Package} ${Version}\\n"]
    debian = {tuple(line.split()) for line in podman("run", "--rm", "--network=none", *query).splitlines()}
    assert "libc6" in {name for name, _ in debian}
    assert debian - {(name, release) for kind, name, release in listed if kind == "pkg:deb"} == set()


# ------------------------------------------------------------------------------------------------------ how it runs


def test_the_sample_by_curl_as_typed(server: Container) -> None:
    command = ["curl", "-s", "-w", "%{stderr}%{http_code}", "-d", "@sample.json"]
    answer = subprocess.run(
        [*command, f"{server.url}/v1/models/aitextgen:predict"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stderr == "200"
    assert len(json.loads(answer.stdout)["predictions"][0].split()) > 10


def test_our_compiled_kernels_serve(server: Container) -> None:
    (line,) = [line for line in server.get("/metrics").text.splitlines() if line.startswith("predictor_model_info{")]
    assert 'backend="engine"' in line
    assert 'device="cpu"' in line
    assert re.search(r"CPU kernels: \w+, \d+ threads", server.log.read_text())


def test_it_is_not_root_and_can_write_to_tmp_alone(server: Container) -> None:
    assert server.execute("id", "-u").strip() == "10001"
    # Of the root and of what is mounted on it; what it may not even look into is no matter.
    search = "find / -xdev -writable -not -type l 2>/dev/null; find /mnt/models -writable; true"
    assert server.execute("sh", "-c", search).split() == ["/tmp"]


@pytest.mark.parametrize("command", [["--help"], ["rollout", "--help"], ["serve", "--help"]])
def test_the_other_commands_are_there(podman: Podman, image: str, command: list[str]) -> None:
    called = ["run", "--rm", "--read-only", "--network=none", "--entrypoint=python", image, "-m", "predictor"]
    assert "Usage" in podman(*called, *command)


def test_sigterm_while_loading_ends_it_in_seconds(podman: Podman, image: str, tmp_path: Path) -> None:
    with running(podman, tmp_path / "log", image, *FLAGS, options=VOLUME) as container:
        container.wait_for_port()
        assert container.get("/v1/models/aitextgen").status_code == 503, "it has loaded already"
        seconds, status = stop(container)
    assert status in (0, 143)
    assert seconds < 10


def test_any_user_id_serves_and_sigterm_loses_no_request(podman: Podman, image: str, tmp_path: Path) -> None:
    """OpenShift gives a container a user id that the image does not know, in group 0."""
    options = (*VOLUME, "--user=1000740000:0")
    with running(podman, tmp_path / "log", image, *FLAGS, options=options) as container:
        container.wait_until_ready("aitextgen")
        assert container.execute("id", "-u").strip() == "1000740000"
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(container.predict, "aitextgen", LONG)
            wait_for(lambda: container.metric("predictor_requests_running") > 0)
            seconds, status = stop(container)
            assert answer.result().status_code == 200
    assert status in (0, 143)
    assert seconds < 30  # the request's own time, some 5 s on 2 cores, and the end


def test_sigterm_ends_an_idle_server_in_seconds(podman: Podman, image: str, server: Container) -> None:
    """The last to use `server`."""
    seconds, status = stop(server)
    assert status in (0, 143)
    assert seconds < 10


def stop(container: Container) -> tuple[float, int]:
    """Seconds from SIGTERM to the end, and the exit status."""
    began = time.monotonic()
    container.terminate()
    status = container.wait()
    return time.monotonic() - began, status


# -------------------------------------------------------------------------------------------------- how it is built


def test_a_change_of_the_code_rebuilds_one_layer(
    podman: Podman, base: str, image: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inspect(podman, image)["RootFS"]["Layers"]
    changed = shutil.copytree(tree, tmp_path / "changed")
    with (changed / "predictor" / "errors.py").open("a") as source:
        source.write(f"# {time.time_ns()}\n")
    began = time.monotonic()
    make(podman, changed, "image-cpu", BASE=base, IMAGE=f"{IMAGE}-changed")
    with capsys.disabled():
        print(f"\na change of the code rebuilt the image in {time.monotonic() - began:.1f} s")
    after = inspect(podman, image.replace(IMAGE, f"{IMAGE}-changed"))["RootFS"]["Layers"]
    assert after[:-1] == before[:-1]
    assert after[-1] != before[-1]


# ---------------------------------------------------------------------------------------------------- the GPU image


@pytest.fixture(scope="module")
def cuda(podman: Podman, base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stands in for NVIDIA's image, whose registry tests do not need: a real nvcc, of CUDA 12.4."""
    name = "localhost/cuda-toolkit:12.4"
    if not podman.has(name):
        folder = tmp_path_factory.mktemp("cuda")
        toolkit = make_toolkit(folder, base.partition(":")[2])
        recipe = folder / "Dockerfile"
        recipe.write_text(f"FROM {base}\nCOPY . /usr/local/cuda-12.6\n")
        podman("build", f"--file={recipe}", f"--tag={name}", str(toolkit))
    return name


@pytest.fixture(scope="module")
def torch_cuda(podman: Podman, image: str) -> str:
    """The CUDA of the torch that this machine's pip has: None, as a rule."""
    return python(podman, image, "import torch; print(torch.version.cuda)")


def test_a_torch_without_v100_stops_the_build(podman: Podman, base: str, tree: Path, torch_cuda: str) -> None:
    arguments = (f"--build-arg=BASE={base}", "--build-arg=TORCH_INDEX=", "--build-arg=TORCH_CUDA=0")
    with pytest.raises(AssertionError, match=f"torch is built for CUDA {torch_cuda}"):
        podman.build(tree, "--target=gpu-packages", *arguments)


def test_the_gpu_image_builds_with_this_machines_torch_and_compiler(
    podman: Podman, base: str, cuda: str, tree: Path, torch_cuda: str, version: str
) -> None:
    """Every stage of it but NVIDIA's own; torch's cu126 wheels and CUDA 12.6 are what it does not have here."""
    flags = ("--build-arg=TORCH_INDEX=", f"--build-arg=TORCH_CUDA={torch_cuda}")
    make(podman, tree, "image-gpu", *flags, BASE=base, CUDA_IMAGE=cuda)
    image = f"localhost/{IMAGE}:{version}"
    code = "from predictor.model.cuda import build; print(*build.libraries(), build.library_path())"
    built, expected = python(podman, image, code).split()
    assert built == expected, "it was compiled from other sources"
    with podman.mounted(image) as files:
        volume = f"--volume={files}{built}:/kernels.so:ro"
        dump = ["--entrypoint=/usr/local/cuda-12.6/bin/cuobjdump", cuda, "--list-elf", "/kernels.so"]
        listed = podman("run", "--rm", "--network=none", volume, *dump)
    sources = len(list((tree / "predictor/model/cuda").glob("*.cu")))
    for architecture in ("sm_70", "sm_80", "sm_90"):
        assert listed.count(f".{architecture}.cubin") >= sources, listed  # and one of the link
    environment = dict(one.split("=", 1) for one in inspect(podman, image)["Config"]["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
