"""Real images for tests: a base by debootstrap, builds by podman as root, containers that are always ended.

The base and the layers stay in podman's store, so that a second run takes seconds where the first takes minutes.
"""

from __future__ import annotations

import ast
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tests.conftest import ROOT, left_out
from tests.processes import ServerProcess, free_port

# What podman needs where systemd is not in charge of the cgroups, and root may not raise every limit.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

# Folders of the machine that pip's settings name, as seen while an image is built.
INSIDE = "/tmp/host"


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What it writes to stdout; where it fails, the end of all it wrote."""
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    written = (result.stdout + result.stderr)[-4000:]
    assert result.returncode == 0, f"{shlex.join(command)} ended with {result.returncode}:\n{written}"
    return result.stdout


class Podman:
    """podman with settings of its own, and what a build needs of this machine's apt and pip settings.

    A folder of the test's is /tmp while an image is built: that is HOME there, so pip finds its settings, and what is
    mounted over a folder that exists leaves no trace in a layer.
    """

    def __init__(self, folder: Path) -> None:
        for part in ("podman", "runc", "debootstrap"):
            if shutil.which(part) is None:
                left_out(f"{part} is not installed: no image is built")
        if os.geteuid() != 0:
            left_out("only root can make a base by debootstrap: no image is built")
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        self.environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.temporary.chmod(0o1777)
        self.pip_sources: set[Path] = set()
        self._write_pip_settings()

    def __call__(self, *arguments: str) -> str:
        return run(["podman", *arguments], self.environment)

    @property
    def build_flags(self) -> list[str]:
        """chroot asks nothing of the kernel that a machine without systemd lacks."""
        apt = [Path("/etc/apt"), Path("/usr/share/keyrings")]
        return [
            "--isolation=chroot",
            "--network=host",
            f"--volume={self.temporary}:/tmp",
            *(f"--volume={path}:{path}:ro" for path in apt),
            *(f"--volume={path}:{INSIDE}{path}:ro" for path in sorted(self.pip_sources)),
        ]

    def build(self, context: Path, *flags: str) -> None:
        self("build", *self.build_flags, *flags, str(context))

    def has(self, image: str) -> bool:
        return subprocess.run(["podman", "image", "exists", image], env=self.environment, check=False).returncode == 0

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The image's files."""
        yield Path(self("image", "mount", image).strip())
        self("image", "unmount", image)

    def base(self) -> str:
        """The name of a minimal system of this machine's own release, from its own mirror; made where it is missing."""
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        name = f"localhost/debootstrap:{release}"
        if self.has(name):
            return name
        system = self.temporary.with_name("system")
        run(["debootstrap", "--variant=minbase", "--include=ca-certificates", release, str(system), mirror(release)])
        archive = system.with_suffix(".tar")
        kept_out = ["--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*"]
        run(["tar", "-C", str(system), *kept_out, "-cf", str(archive), "."])
        self("import", str(archive), name)
        shutil.rmtree(system)
        archive.unlink()
        return name

    def _write_pip_settings(self) -> None:
        """One pip.conf of all of this machine's, its paths as they are during a build."""
        lines = run([sys.executable, "-m", "pip", "config", "list"]).splitlines()
        sections: dict[str, dict[str, str]] = {}
        for line in sorted(lines, key=lambda line: line.startswith(":env:")):  # what the environment says wins
            name, _, value = line.partition("=")
            section, _, option = name.replace(":env:", "global").partition(".")
            words = ast.literal_eval(value).split()
            sections.setdefault(section, {})[option] = " ".join(map(self._as_seen_inside, words))
        text = "".join(
            f"[{section}]\n" + "".join(f"{option} = {value}\n" for option, value in options.items())
            for section, options in sections.items()
        )
        file = self.temporary / ".config" / "pip" / "pip.conf"
        file.parent.mkdir(parents=True)
        file.write_text(text)

    def _as_seen_inside(self, word: str) -> str:
        path = Path(word.removeprefix("file://"))
        if not path.is_absolute() or not path.exists():
            return word
        source = path.parent if word.startswith("file://") else path  # an index links to files that lie beside it
        self.pip_sources.add(source)
        place = self.temporary / INSIDE.removeprefix("/tmp/") / source.relative_to("/")
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        return word.replace(str(path), f"{INSIDE}{path}")


def mirror(release: str) -> str:
    """Where this machine's apt has the release from."""
    targets = run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    )
    for line in targets.splitlines():
        if line.startswith(f"{release} main "):
            return line.split()[2]
    left_out(f"apt has no source of {release}: no image is built")
    raise AssertionError


def copy_of_the_tree(folder: Path) -> Path:
    """What a clone would hold, changes that are not committed included."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Container(ServerProcess):
    """An image as the manifests run it: any user but root, no capabilities, nothing writable but /tmp."""

    def __init__(self, podman: Podman, log: Path, image: str, *flags: str, options: Sequence[str] = ()) -> None:
        self.podman = podman
        self.name = f"gpt2-predictor-{uuid4().hex[:12]}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._out = log.open("w")
        command = [
            *("podman", "run", "--name", self.name, "--network=host"),
            *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,mode=1777"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
            *options,
            *(image, "--host", "127.0.0.1", "--port", str(self.port), *flags),
        ]
        self.process = subprocess.Popen(
            command, stdout=self._out, stderr=subprocess.STDOUT, env=podman.environment, cwd=ROOT
        )

    def execute(self, *command: str) -> str:
        return self.podman("exec", self.name, *command)

    def terminate(self) -> None:
        """As the kubelet does: SIGTERM to process 1."""
        self.podman("kill", "--signal=TERM", self.name)

    def close(self) -> None:
        self.podman("rm", "--force", "--ignore", "--time=0", self.name)
        super().close()


@contextmanager
def running(podman: Podman, log: Path, image: str, *flags: str, options: Sequence[str] = ()) -> Iterator[Container]:
    container = Container(podman, log, image, *flags, options=options)
    try:
        yield container
    finally:
        container.close()
