"""Misspelt keys, planted one at a time: in rendered objects, and in the files of a component."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.manifests import MANIFESTS, Json, with_components

Where = tuple[str | int, ...]


def key_paths(value: Any, at: Where = ()) -> Iterator[Where]:
    """Every key of the value's dictionaries, however deep, and of the YAML in an inline `patch`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*at, key)
            yield from key_paths(_opened(key, inner), (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from key_paths(inner, (*at, index))


def misspelt(value: Any, where: Where) -> Any:
    """A copy of the value in which the last key of the path has one letter too many."""
    step, *rest = where
    if not rest:
        return {f"{key}x" if key == step else key: inner for key, inner in value.items()}
    changed = copy.copy(value)
    inner = misspelt(_opened(step, value[step]), tuple(rest))
    changed[step] = yaml.safe_dump(inner, sort_keys=False) if isinstance(value[step], str) else inner
    return changed


def _opened(key: str | int, value: Any) -> Any:
    return yaml.safe_load(value) if key == "patch" else value


def value_at(value: Any, where: Where) -> Any:
    """The value at a path, or None where it leads nowhere."""
    for step in where:
        try:
            value = _opened(step, value[step])
        except (KeyError, IndexError, TypeError):
            return None
    return value


def contributed(rendered: list[Json], base: list[Json]) -> Iterator[tuple[int, Where]]:
    """The keys that a component adds to base or changes there: the object's index, the path."""
    known = {(item["kind"], item["metadata"]["name"]): item for item in base}
    for index, item in enumerate(rendered):
        before = known.get((item["kind"], item["metadata"]["name"]), {})
        for where in key_paths(item):
            if value_at(before, where) != value_at(item, where):
                yield index, where


def kustomized_files(component: str) -> list[Path]:
    """The files that kustomize itself reads: kustomization.yaml and patches. Resources it passes on as they are."""
    folder = MANIFESTS / "components" / component
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    patches = [folder / patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
    return [folder / "kustomization.yaml", *patches]


def leaf_keys(file: Path) -> list[Where]:
    """A path for each name of a key of the file that holds no other keys: the last place with that name."""
    content = yaml.safe_load(file.read_text())
    leaves = [where for where in key_paths(content) if not list(key_paths(value_at(content, where)))]
    return list({where[-1]: where for where in leaves}.values())


def rendered_with(component: str, file: Path, where: Where, folder: Path) -> list[Json]:
    """Base and the component, whose file has that key misspelt, in a new folder; raises `Refused`."""
    top = component.partition("/")[0]
    shutil.copytree(MANIFESTS / "base", folder / "base")
    shutil.copytree(MANIFESTS / "components" / top, folder / "components" / top)
    text = yaml.safe_dump(misspelt(yaml.safe_load(file.read_text()), where), sort_keys=False)
    (folder / file.relative_to(MANIFESTS)).write_text(text)
    return with_components((component,), folder)
