"""Queries of the manifests: rules and alerts in the real promtool, and only names that the server exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml
from prometheus_client.metrics import MetricWrapperBase

from predictor import observability
from tests.conftest import left_out
from tests.manifests import Json, of_kind, one, rendered

SCENES = Path(__file__).parent / "alerts.yaml"

# What Prometheus and the operator add to each series, and what a histogram's buckets have.
ADDED_LABELS = {"namespace", "pod", "container", "le"}

_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "summary": ["_sum", "_count"]}


def groups() -> list[Json]:
    return [
        group
        for item in of_kind(rendered("components/monitoring"), "PrometheusRule")
        for group in item["spec"]["groups"]
    ]


def rules() -> list[Json]:
    return [rule for group in groups() for rule in group["rules"]]


def dashboard() -> Json:
    page: Json = json.loads(one(rendered("components/monitoring"), "ConfigMap")["data"]["gpt2-predictor.json"])
    return page


def queries() -> Iterator[str]:
    """All PromQL that the manifests send, Grafana's variables filled in."""
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
    yield from (each["expr"] for each in dashboard()["annotations"]["list"])
    for item in of_kind(rendered("components/standard"), "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])


def promtool(*arguments: str, cwd: Path) -> None:
    if shutil.which("promtool") is None:
        left_out("promtool is not on the PATH (apt-get install prometheus): no query is parsed, no alert tried")
    result = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_takes_the_rules_and_their_templates(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", cwd=tmp_path)


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    records = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries())]
    assert len(records) > len(rules())
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
    promtool("check", "rules", "queries.yaml", cwd=tmp_path)


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    bare = [
        {**group, "rules": [{k: v for k, v in rule.items() if k != "annotations"} for rule in group["rules"]]}
        for group in groups()
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": bare}))
    shutil.copy(SCENES, tmp_path)
    promtool("test", "rules", SCENES.name, cwd=tmp_path)


def test_every_alert_is_seen_to_fire_and_to_be_silent() -> None:
    seen = [case for scene in yaml.safe_load(SCENES.read_text())["tests"] for case in scene["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert alerts
    assert {case["alertname"] for case in seen if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in seen if not case.get("exp_alerts")} == alerts


def metrics() -> dict[str, set[str]]:
    """Every series the server exports, with its labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(observability).values():
        if isinstance(metric, MetricWrapperBase):
            (described,) = metric.describe()
            suffixes = _SUFFIXES.get(described.type, [""])
            found |= {described.name + suffix: set(metric._labelnames) for suffix in suffixes}
    return found


def test_queries_name_what_the_server_exports() -> None:
    known, recorded = metrics(), {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    for query in queries():
        used = set(re.findall(r"\brevision:[\w:]+", query))
        assert used <= recorded.keys()
        text = " ".join([re.sub(r"\brevision:[\w:]+", "", query), *(recorded[name] for name in used)])
        names = set(re.findall(r"\bpredictor_\w+", text))
        assert names <= known.keys()
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", text))
        labels.update(*(grouped.split(", ") for grouped in re.findall(r"by \(([\w, ]+)\)", text)))
        alerts = {"alertname", "alertstate"} if "ALERTS" in query else set()
        assert labels <= ADDED_LABELS.union(alerts, *(known[name] for name in names)), query


def test_the_names_are_really_compared() -> None:
    assert {"predictor_requests_total", "predictor_inter_token_seconds_bucket"} <= metrics().keys()
    assert metrics()["predictor_requests_total"] == {"model_name", "revision", "code"}


def test_panels_do_not_lie_over_each_other() -> None:
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard()["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
