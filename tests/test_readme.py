"""What the README says is so: its examples parse, its table is the code's, its commands exist."""

from __future__ import annotations

import json
import re

import pytest

from predictor.protocols import v1
from predictor.protocols.parameters import Parameters
from predictor.protocols.wire import Limits
from predictor.settings import Settings, flag
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
LIMITS = Limits(max_instances=64, max_timeout_s=300)


def test_the_sample_shown_is_the_sample() -> None:
    shown = re.search(r"\$ cat sample\.json\n(\{.*?\n\})\n", README, re.DOTALL)
    assert shown is not None
    sample = (ROOT / "sample.json").read_text()
    assert json.loads(shown[1]) == json.loads(sample)
    assert len(v1.parse(json.loads(sample), LIMITS).rows) == 1


def test_every_json_block_is_a_request_that_parses() -> None:
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        assert v1.parse(json.loads(block), LIMITS).rows


def test_the_parameter_table_names_every_parameter_and_no_other() -> None:
    table = README[README.index("| parameter (alias)") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:])))
    aliases = {"max_tokens", "num_return_sequences"}
    assert named == set(Parameters.model_fields) | aliases


def test_the_files_and_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)\s*make ([a-z-]+)", README, re.MULTILINE):
        assert target in targets, target
    for path in re.findall(r"`((?:docs|manifests|models|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / path).exists() or path == "models/mine", path


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md", "docs/architecture.md", "docs/protocols.md"])
def test_the_flags_it_names_are_flags(page: str) -> None:
    known = {flag(name) for name in Settings.model_fields}
    text = (ROOT / page).read_text()
    for line in text.splitlines():
        if "predictor serve" in line:
            assert set(re.findall(r"--[a-z][a-z-]+", line)) <= known | {"--help"}, line
