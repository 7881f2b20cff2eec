"""What `kubectl apply -k manifests/base` sends, and the rules for all that is rendered: each catches a bad manifest.

Schemas catch typos. Rules are what no schema holds: what KServe or Knative refuses, drops without a word, or fills in
wrongly. tests/test_components.py applies both to every component and overlay.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.bad_manifests import BAD, Spoil
from tests.conftest import ROOT, left_out
from tests.manifest_rules import RULES, flags_needed
from tests.manifest_schemas import CRDS, complaints
from tests.manifests import (
    BASE,
    MANIFESTS,
    Json,
    Rule,
    base_by_hand,
    config_features,
    one,
    predictor_of,
    rendered,
)


@pytest.fixture
def base() -> list[Json]:
    return rendered("base")


def test_the_merge_without_kubectl_is_what_kustomize_renders(base: list[Json]) -> None:
    if shutil.which("kubectl") is None:
        left_out("kubectl is not on the PATH: manifests/base is merged by the test, not by kustomize")

    def in_order(objects: list[Json]) -> list[Json]:
        return sorted(objects, key=lambda item: str(item["kind"]))

    assert in_order(base_by_hand()) == in_order(base)


# --------------------------------------------------------------------------------------------------------- schemas


def test_the_schemas_admit_the_base(base: list[Json]) -> None:
    assert [problem for item in base for problem in complaints(item)] == []


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda predictor: predictor.update(containerConcurency=32), "has no .'containerConcurency'"),
        (lambda predictor: predictor.update(timeout="300"), "'300' is not of type int"),
        (lambda predictor: predictor["containers"][0]["livenessProbe"]["httpGet"].update(paht="/"), "has no .'paht'"),
        (lambda predictor: predictor["volumes"][0]["persistentVolumeClaim"].update(readonly=True), "no .'readonly'"),
    ],
)
def test_the_models_catch_a_typo_and_a_wrong_type(
    spoil: Callable[[Json], Any], complaint: str, base: list[Json]
) -> None:
    spoil(predictor_of(base))
    assert re.search(complaint, "\n".join(complaints(one(base, "InferenceService"))))


@pytest.mark.parametrize(
    "item",
    [
        {"apiVersion": "apps/v2", "kind": "Deployment"},
        {"apiVersion": "serving.kserve.io/v1alpha2", "kind": "InferenceService"},
        {"apiVersion": "v1", "kind": "PersistentVolumeClame"},
        {"kind": "PersistentVolumeClaim"},
    ],
    ids=["version", "kserve", "kind", "none"],
)
def test_a_kind_that_no_schema_knows_is_an_error(item: Json) -> None:
    assert list(complaints(item | {"metadata": {"name": "a"}}))


def needs_crds() -> None:
    if not CRDS.is_dir():
        left_out("../shared/crds is not there: nothing is held against the CRDs of KServe, Knative, KEDA, Prometheus")


def test_a_custom_kind_that_no_schema_knows_is_an_error() -> None:
    needs_crds()
    assert list(complaints({"apiVersion": "keda.sh/v1", "kind": "ScaledObject", "metadata": {"name": "a"}}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda predictor: predictor.update(scaleMetric="gpu"),
        lambda predictor: predictor["containers"][0].update(lifecycle={"preStop": {"sleep": {"seconds": 5}}}),
        lambda predictor: predictor.update(terminationGracePeriodSeconds=60),
    ],
    ids=["metric", "lifecycle", "grace"],
)
def test_the_custom_resource_definitions_catch_what_knative_forbids(
    spoil: Callable[[Json], Any], base: list[Json]
) -> None:
    needs_crds()
    spoil(predictor_of(base))
    assert list(complaints(one(base, "InferenceService")))


# ----------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_base_keeps_the_rule(rule: Rule, base: list[Json]) -> None:
    assert list(rule(base, config_features())) == []


def test_no_flag_of_knative_is_on_for_nothing(base: list[Json]) -> None:
    assert flags_needed(base) == config_features().keys()
    assert set(config_features().values()) == {"enabled"}


CASES = [(name, rule, spoil) for name, rules in BAD.items() for rule, spoils in rules.items() for spoil in spoils]


@pytest.mark.parametrize(("name", "rule", "spoil"), CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_the_rule_catches_a_bad_manifest(name: str, rule: str, spoil: Spoil) -> None:
    check = {each.__name__: each for each in RULES}[rule]
    objects, flags = rendered(name), config_features()
    assert list(check(objects, flags)) == []
    spoil(objects, flags)
    assert list(check(objects, flags)) != []


def test_every_rule_has_a_bad_manifest() -> None:
    assert {rule for _, rule, _ in CASES} == {rule.__name__ for rule in RULES}


# ----------------------------------------------------------------------------------------------- the files beside


def test_the_tag_stands_in_one_place() -> None:
    tag = yaml.safe_load((BASE / "kustomization.yaml").read_text())["images"][0]["newTag"]
    version = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert tag == version[1]
    with_it = [path for path in MANIFESTS.rglob("*") if path.is_file() and tag in path.read_text()]
    assert with_it == [BASE / "kustomization.yaml"]


def test_the_service_account_patch_is_a_service_account_and_nothing_else() -> None:
    patch = yaml.safe_load((ROOT / "image-secrets-serviceaccount.patch.yaml").read_text())
    assert patch == {"imagePullSecrets": [{"name": "docker-hub"}]}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}, **patch}
    assert list(complaints(account)) == []


def test_the_features_patch_fits_a_config_map() -> None:
    patch = yaml.safe_load((MANIFESTS / "config-features.patch.yaml").read_text())
    assert patch.keys() == {"data"}
    assert list(complaints({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, **patch})) == []


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md", "manifests/README.md"])
def test_what_a_page_applies_is_there_and_valid(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = re.findall(r"(?<![\w./])manifests/[\w./-]*[\w-]", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for manifest in re.findall(r"<<EOF\n(.*?)\nEOF\n", text, flags=re.DOTALL):
        for item in yaml.safe_load_all(manifest):
            assert list(complaints(item)) == []


def test_the_sample_is_a_v1_body() -> None:
    sample = json.loads((ROOT / "sample.json").read_text())
    assert sample.keys() == {"instances", "parameters"}
    assert all(isinstance(instance, str) and instance for instance in sample["instances"])
    assert sample["parameters"].keys() <= {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
