"""Every component over base, some of them together, and every overlay: valid, by the rules, and proof against typos."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import typer
import yaml

from predictor.cli import app
from predictor.rollout.rules import load_rules
from tests.conftest import left_out
from tests.manifest_rules import RULES
from tests.manifest_schemas import CRDS, complaints
from tests.manifests import (
    MANIFESTS,
    OURS,
    Json,
    Refused,
    components,
    config_features,
    container_of,
    containers,
    flags_of,
    of_kind,
    one,
    overlays,
    predictor_of,
    rendered,
)
from tests.misspelling import (
    Where,
    contributed,
    kustomized_files,
    leaf_keys,
    misspelt,
    rendered_with,
)

COMPONENTS = components()
TOGETHER = (
    "h100+monitoring+security+rollout+pipeline+jobs+canary",
    "a100+model-cache/hf+canary+scale-to-zero",
    "monitoring+rollout+jobs+canary",
    "standard+monitoring+security+api-keys",
    "rollout+model-cache/download+canary+cpu",
    "scale-to-zero+monitoring+cpu",
)
EVERYTHING = [
    "base",
    *(f"components/{name}" for name in (*COMPONENTS, *TOGETHER)),
    *(f"overlays/{name}" for name in overlays()),
]


def wrong(objects: list[Json]) -> Iterator[str]:
    """What schemas say, or rules, which need objects of the right shape."""
    by_schemas = [problem for item in objects for problem in complaints(item)]
    flags = config_features()
    yield from by_schemas or chain.from_iterable(rule(objects, flags) for rule in RULES)


@pytest.mark.parametrize("name", EVERYTHING)
def test_schemas_and_rules_admit_it(name: str) -> None:
    assert list(wrong(rendered(name))) == []


def test_the_components_asked_for_are_there() -> None:
    asked = "v100 cpu canary standard scale-to-zero jobs monitoring security model-cache pipeline rollout"
    assert set(asked.split()) <= set(COMPONENTS)


# ------------------------------------------------------------------------------------------------ what each one does


@pytest.mark.parametrize("name", [name for name in COMPONENTS if name != "v100"])
def test_a_component_changes_what_base_is(name: str) -> None:
    assert rendered(f"components/{name}") != rendered("base")


def test_base_is_the_v100_class() -> None:
    assert rendered("components/v100") == rendered("base")


def test_every_patch_with_a_target_finds_it() -> None:
    """Kustomize does nothing, and says nothing, where a target matches no object."""
    for name in COMPONENTS:
        kustomization = yaml.safe_load((MANIFESTS / "components" / name / "kustomization.yaml").read_text())
        there = {(item["kind"], item["metadata"]["name"]) for item in rendered(f"components/{name}")}
        for patch in (patch for patch in kustomization.get("patches", []) if "target" in patch):
            assert patch["target"]["group"] == "serving.kserve.io"
            assert (patch["target"]["kind"], patch["target"]["name"]) in there


def test_concurrency_is_what_the_memory_of_the_gpu_holds() -> None:
    rows = re.findall(r"\| `([\w-]+)`[^|]* \|[^|]*\| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \|", _readme())
    assert {name for name, *_ in rows} == {"v100", "v100-32gb", "t4", "l4", "a100", "a100-80gb", "h100", "h200"}
    graphs = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256}
    for name, *numbers in rows:
        memory, fit, held, concurrency = (int(number.replace(",", "")) for number in numbers)
        objects = rendered(f"components/{name}")
        # MiB: the weights; CUDA, graphs and activations; 1,024 tokens of 300 KiB
        assert fit == (memory - 2968 - 1430) // 300
        assert held == int(0.9 * (memory - 2968 - 500) / 300)
        assert concurrency == max(graph for graph in graphs if graph <= held)
        assert predictor_of(objects)["containerConcurrency"] == concurrency
        assert int(flags_of(container_of(objects)).get("--max-running", 64)) >= concurrency


def _readme() -> str:
    return (MANIFESTS / "README.md").read_text()


def test_the_page_names_every_component_and_overlay() -> None:
    named = set(re.findall(r"`([\w/-]+)`", _readme()))
    assert set(COMPONENTS) | set(overlays()) <= named


def test_the_canary_sets_the_tag_and_the_share_together() -> None:
    for name in ("components/canary", "overlays/canary"):
        objects, base = rendered(name), rendered("base")
        repository, tag = container_of(objects)["image"].split(":")
        assert (repository, tag) != tuple(container_of(base)["image"].split(":"))
        assert repository == container_of(base)["image"].split(":")[0]
        assert predictor_of(objects)["canaryTrafficPercent"] == 10


def test_a_canary_leaves_the_other_containers_on_the_stable_tag() -> None:
    objects, stable = rendered("components/monitoring+rollout+jobs+canary"), container_of(rendered("base"))["image"]
    others = {c["image"] for name, _, c in containers(objects) if OURS in c["image"] and "InferenceService" not in name}
    assert others == {stable}
    assert container_of(objects)["image"] != stable


def test_the_cpu_tag_is_the_tag_and_a_suffix() -> None:
    base = container_of(rendered("base"))["image"]
    assert container_of(rendered("overlays/cpu"))["image"] == f"{base}-cpu"
    canary = container_of(rendered("components/canary"))["image"]
    together = rendered("components/rollout+model-cache/download+canary+cpu")
    assert container_of(together)["image"] == f"{canary}-cpu"
    assert {container["image"] for _, _, container in containers(together)} == {f"{canary}-cpu", f"{base}-cpu"}


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "overlays/weights"])
def test_replicas_share_their_jobs_or_take_none(name: str) -> None:
    """A job in a replica's own file is a 404 of the others', and goes with the replica."""
    objects = rendered(name)
    kept = [flag for flag in container_of(objects)["args"] if flag.startswith("--jobs=")]
    if predictor_of(objects)["maxReplicas"] > 1 or kept:
        assert kept == ["--jobs=redis://aitextgen-redis:6379/0" if "jobs" in name else "--jobs=none"]


def test_the_original_keeps_its_numbers() -> None:
    predictor = predictor_of(rendered("overlays/original"))
    amounts = {"cpu": "3", "memory": "18Gi", "nvidia.com/gpu": "1"}
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (3, 10)
    assert predictor["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    (term,) = predictor["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [{"key": "gpu.nvidia.com/class", "operator": "In", "values": ["Tesla_V100"]}]


def test_production_has_what_kserve_does_not_make() -> None:
    kinds = {item["kind"] for item in rendered("overlays/production")}
    assert {"PodDisruptionBudget", "NetworkPolicy", "PodMonitor"} <= kinds


def test_the_weights_come_without_the_service() -> None:
    kinds = {item["kind"] for item in rendered("overlays/weights")}
    assert kinds == {"PersistentVolumeClaim", "Job"}


def test_the_controller_may_do_what_a_rollout_does_and_no_more() -> None:
    for name in ("rollout", "pipeline"):
        role = one(rendered(f"components/{name}"), "Role")
        allowed = {(rule["resources"][0], verb) for rule in role["rules"] for verb in rule["verbs"]}
        needed = {("inferenceservices", "get"), ("inferenceservices", "patch"), ("events", "create")}
        assert needed <= allowed <= needed | {("inferenceservices", "list"), ("inferenceservices", "watch")}


def test_the_controllers_rules_are_rules(tmp_path: Path) -> None:
    (configuration,) = of_kind(rendered("components/rollout"), "ConfigMap")
    (tmp_path / "rules.yaml").write_text(configuration["data"]["rules.yaml"])
    assert load_rules(tmp_path / "rules.yaml").steps == (10, 25, 50, 100)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_arguments_are_options_of_the_commands(name: str) -> None:
    for container in (c for _, _, c in containers(rendered(name)) if OURS in c["image"]):
        command = [*container.get("command", ["python", "-m", "predictor", "serve"]), *container["args"]]
        if command[:3] != ["python", "-m", "predictor"]:
            continue
        words = " ".join(word for word in command[3:] if not word.startswith("--"))
        known = _options(words)
        for option in flags_of({"args": command}):
            assert known is not None, words
            assert option in known, f"{words} {option}"


def _options(words: str) -> set[str] | None:
    command = typer.main.get_command(app)
    for word in words.split():
        if word not in command.commands:
            return None
        command = command.commands[word]
    return {option for parameter in command.params for option in parameter.opts}


# ------------------------------------------------------------------------------------------------------------ typos


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_misspelt_key_in_what_a_component_renders_is_caught(name: str) -> None:
    """Every key that it adds or changes, one at a time. No key is left out: what is free text has a rule."""
    _need_crds()
    objects, unnoticed = rendered(f"components/{name}"), []
    for index, where in contributed(objects, rendered("base")):
        item = misspelt(objects[index], where)
        if not list(complaints(item)) and not list(wrong([*objects[:index], item, *objects[index + 1 :]])):
            unnoticed.append((item["kind"], where))
    assert unnoticed == []


# Kustomize's own words where it does not name the key: an operation, an object's identity, the start of a patch.
REFUSALS = r"Unexpected kind|no matches for Id|unable to parse SM or JSON patch"


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_misspelt_key_in_the_files_of_a_component_is_caught(name: str, tmp_path: Path) -> None:
    """Each file that kustomize reads, by each name of a key: kustomize refuses it, or schemas and rules do."""
    _need_crds()
    rendered(f"components/{name}")  # leaves the test out without kubectl

    def unnoticed(number: int, file: Path, where: Where) -> str:
        try:
            objects = rendered_with(name, file, where, tmp_path / str(number))
        except Refused as refusal:
            told = re.search(rf"{re.escape(str(where[-1]))}|{REFUSALS}", str(refusal), flags=re.IGNORECASE)
            return "" if told else f"{file.name} {where}: refused, but not for that: {refusal}"
        return "" if list(wrong(objects)) else f"{file.name} {where}"

    places = [(file, where) for file in kustomized_files(name) for where in leaf_keys(file)]
    assert places
    with ThreadPoolExecutor() as threads:  # most of the time kustomize's processes are waited for
        found = threads.map(lambda place: unnoticed(place[0], *place[1]), enumerate(places))
        assert [each for each in found if each] == []


def _need_crds() -> None:
    if not CRDS.is_dir():
        left_out("../shared/crds is not there: nothing shows that a typo in a custom resource is caught")
