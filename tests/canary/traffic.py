"""What KServe and Knative make of a traffic split: pure functions over an InferenceService's status.

From the sources of KServe 0.15 and 0.16 (`createKnativeService` and `PropagateStatus`) and Knative's routes:
- KServe asks Knative for `canaryTrafficPercent` on the "latest revision" and the rest, tagged `prev`, on the revision
  that last had everything; without the field the latest revision gets 100.
- To Knative the latest revision is the newest that is *ready*: until a new one is, its share goes to the old one.
- With the annotation `serving.kserve.io/enable-tag-routing` the latest revision's entry has the tag `latest`. An entry
  with a tag has a URL of its own.
- A revision that has 100 becomes `latestRolledoutRevision`, and the one before `previousRolledoutRevision`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

Entry = dict[str, Any]  # of `traffic`: {"latestRevision", "percent", "revisionName"?, "tag"?, "url"?}
ComponentStatus = dict[str, Any]  # `status.components.predictor`

# `serviceAnnotationDisallowedList` of KServe's ConfigMap `inferenceservice-config`, as KServe ships it. All other
# annotations of an InferenceService, and its labels, are copied to the revision's template.
DISALLOWED_ANNOTATIONS = (
    "autoscaling.knative.dev/min-scale",
    "autoscaling.knative.dev/max-scale",
    "internal.serving.kserve.io/storage-initializer-sourceuri",
    "kubectl.kubernetes.io/last-applied-configuration",
)
_TAG_ROUTING = "serving.kserve.io/enable-tag-routing"


def component_status(service: dict[str, Any]) -> ComponentStatus:
    found: ComponentStatus = service.get("status", {}).get("components", {}).get("predictor", {})
    return found


def revision_template(service: dict[str, Any], disallowed: tuple[str, ...]) -> dict[str, Any]:
    """What makes a revision: Knative creates a new one whenever this changes."""
    metadata, predictor = service["metadata"], service["spec"]["predictor"]
    annotations = metadata.get("annotations", {})
    return {
        "annotations": {key: value for key, value in annotations.items() if key not in disallowed},
        "labels": metadata.get("labels", {}),
        "predictor": {key: value for key, value in predictor.items() if key != "canaryTrafficPercent"},
    }


def wanted_traffic(service: dict[str, Any]) -> list[Entry]:
    """`spec.traffic` of the Knative Service that KServe makes of an InferenceService."""
    percent: int | None = service["spec"]["predictor"].get("canaryTrafficPercent")
    rolled_out = component_status(service).get("latestRolledoutRevision")
    tagged = service["metadata"].get("annotations", {}).get(_TAG_ROUTING) == "true"
    tag = {"tag": "latest"} if tagged else {}
    if percent is None or not rolled_out:
        return [{"latestRevision": True, "percent": 100, **tag}]
    entries: list[Entry] = [{"latestRevision": True, "percent": percent, **tag}]
    if percent < 100:
        entries.append({"latestRevision": False, "percent": 100 - percent, "revisionName": rolled_out, "tag": "prev"})
    return entries


def routed_traffic(wanted: list[Entry], latest_ready: str, urls: dict[str, str]) -> list[Entry]:
    """`status.traffic` of the Knative Service; `urls` by revision."""
    named: list[Entry] = [{**entry, "revisionName": entry.get("revisionName", latest_ready)} for entry in wanted]
    return [{**entry, "url": urls[entry["revisionName"]]} if "tag" in entry else entry for entry in named]


def weights(traffic: list[Entry]) -> dict[str, int]:
    """Percent by revision."""
    return dict(sum((Counter({entry["revisionName"]: entry["percent"]}) for entry in traffic), Counter()))


def propagated(
    status: ComponentStatus, latest_created: str, latest_ready: str, traffic: list[Entry]
) -> ComponentStatus:
    """`status.components.predictor` after KServe has looked at its Knative Service."""
    after = {**status, "latestCreatedRevision": latest_created, "traffic": traffic}
    if not latest_ready:
        return after
    after["latestReadyRevision"] = latest_ready
    for entry in traffic:
        if not entry["latestRevision"] or entry["revisionName"] != latest_ready:
            continue
        if after.get("latestRolledoutRevision") != latest_ready:
            if entry["percent"] == 100:
                if "latestRolledoutRevision" in after:
                    after["previousRolledoutRevision"] = after["latestRolledoutRevision"]
                after["latestRolledoutRevision"] = latest_ready
        # A revision that had everything is asked to give some back: KServe notices that both entries name it.
        elif latest_ready == latest_created and entry["percent"] < 100 and weights(traffic) == {latest_ready: 100}:
            after["latestRolledoutRevision"] = after.get("previousRolledoutRevision") or latest_ready
    return after
