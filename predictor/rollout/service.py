"""The InferenceService as the API gives it: what a rollout reads of it, and the patches it sends. Pure.

A rollout is recorded in one annotation, written with the image and its first share and never again: KServe copies
annotations to the revision's template, so a change of one alone would make another revision. Everything that changes
meanwhile is read from the service itself.
"""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from predictor.errors import ConfigurationError
from predictor.rollout.rules import one_line

Json = dict[str, Any]
Phase = Literal["waiting", "comparing", "promoted", "rolled back", "superseded"]

RECORD = "rollout.gpt2-predictor/state"
MANAGER = "gpt2-predictor-rollout"
_MODE = "serving.kserve.io/deploymentMode"
_CONTAINER = "kserve-container"
_OWNS_SHARE = "f:canaryTrafficPercent"
_TIME = TypeAdapter(AwareDatetime)

# [host[:port]/]path[:tag][@digest], as container registries have it.
_IMAGE = re.compile(
    r"[\w.-]+(:\d+(?=/))?(/[\w.-]+)*(?P<tag>:\w[\w.-]{0,127})?(?P<digest>@sha256:[0-9a-f]{64})?", re.ASCII
)


class Version(BaseModel):
    """What distinguishes one version from the next: the image, and the weights it is told to serve."""

    model_config = ConfigDict(frozen=True)

    image: str
    model: str  # NAME=SOURCE, the value of `--model`; empty where the container is given none

    def told_beside(self, other: Version) -> str:
        """For people, who are told of the weights where these differ."""
        return self.image if self.model == other.model else f"{self.image} with {self.model}"


class Record(BaseModel):
    """What was so when a rollout began."""

    model_config = ConfigDict(frozen=True)

    canary: Version
    stable: Version
    stable_revision: str
    newest_revision: str  # the canary's is a later one
    started: AwareDatetime


class Service:
    """One InferenceService, as it was read."""

    def __init__(self, found: Json) -> None:
        """Raises LookupError, TypeError or AttributeError for what is no InferenceService."""
        self._metadata: Json = found["metadata"]
        self._metadata["resourceVersion"]
        self._predictor: Json = found["spec"]["predictor"]
        self._status: Json = found.get("status", {})
        self._component: Json = self._status.get("components", {}).get("predictor", {})

    # ------------------------------------------------------------------------------------------------- what is asked

    @property
    def mode(self) -> str:
        return str(self._metadata.get("annotations", {}).get(_MODE, ""))

    @property
    def version(self) -> Version:
        container = _container(self._predictor)
        place, prefix = _place_of_model(container.get("args", []))
        model = "" if place is None else container["args"][place].removeprefix(prefix)
        return Version(image=container["image"], model=model)

    @property
    def percent(self) -> int:
        """The share of the newest revision, once it is ready."""
        percent = self._predictor.get("canaryTrafficPercent")
        return 100 if percent is None else int(percent)

    @cached_property
    def record(self) -> Record | None:
        """The last rollout's; None where there is none that can be read."""
        text = self._metadata.get("annotations", {}).get(RECORD)
        try:
            return None if text is None else Record.model_validate_json(text)
        except ValidationError:
            return None

    # ------------------------------------------------------------------------------------------- what KServe reports

    @property
    def stable_revision(self) -> str:
        """The last revision that had all the traffic; empty before the first is ready."""
        asked_for_all = self.ready_revision if self.percent == 100 else ""
        return str(self._component.get("latestRolledoutRevision", asked_for_all))

    @property
    def newest_revision(self) -> str:
        """The revision made last, whether or not it is ready."""
        return str(self._component.get("latestCreatedRevision", self.ready_revision))

    @property
    def ready_revision(self) -> str:
        """The newest revision that is ready: to Knative the "latest" one, which has the canary's share."""
        return str(self._component.get("latestReadyRevision", ""))

    @property
    def traffic(self) -> list[tuple[str, int]]:
        """Revisions and their shares."""
        entries: list[Json] = self._component.get("traffic", [])
        latest = self.ready_revision
        return [(str(each.get("revisionName", latest)), int(each.get("percent") or 0)) for each in entries]

    def sharing_beside(self, stable: str) -> str:
        """The revision that has traffic beside the stable one; empty where none has."""
        traffic = self.traffic or [(self.ready_revision, self.percent)]
        return next((revision for revision, percent in traffic if percent and revision != stable), "")

    def url_of(self, revision: str) -> str | None:
        """A revision's own address, which it has with tag routing."""
        entries: list[Json] = self._component.get("traffic", [])
        return next((each["url"] for each in entries if each.get("revisionName") == revision and "url" in each), None)

    # ----------------------------------------------------------------------------------------------- of the rollout

    @property
    def phase(self) -> Phase | None:
        """Where the last rollout stands; None where there never was one."""
        record = self.record
        if record is None:
            return None
        if self.version != record.canary:
            return "superseded"
        if self.percent in (0, 100):
            return "promoted" if self.percent else "rolled back"
        has_share = not self.traffic or (self.newest_revision, self.percent) in self.traffic
        return "comparing" if has_share and self.canary_is_ready(record) else "waiting"

    @property
    def running(self) -> bool:
        return self.phase in ("waiting", "comparing")

    def canary_is_made(self, record: Record) -> bool:
        return self.newest_revision not in (record.newest_revision, record.stable_revision)

    def canary_is_ready(self, record: Record) -> bool:
        return self.canary_is_made(record) and self.ready_revision == self.newest_revision

    @property
    def failure(self) -> str | None:
        """Why the newest revision will not become ready or has ceased to be, in Knative's words, one line."""
        for condition in self._status.get("conditions", []):
            if condition.get("status") == "False" and condition.get("reason") == "RevisionFailed":
                return one_line(str(condition.get("message", "RevisionFailed")))
        return None

    @property
    def shared_at(self) -> datetime | None:
        """When the share was last set, by the API server's books of who wrote what; None where it keeps none."""
        fields = self._metadata.get("managedFields", [])
        owners = [each for each in fields if _OWNS_SHARE in json.dumps(each.get("fieldsV1"))]
        # A server that does not say what was written, or a share that was removed: our own last write.
        return _latest(owners or [each for each in fields if each.get("manager") == MANAGER], "time")

    @property
    def ready_since(self) -> datetime | None:
        """When the predictor became ready."""
        conditions = self._status.get("conditions", [])
        ready = [each for each in conditions if each.get("type") == "PredictorReady" and each.get("status") == "True"]
        return _latest(ready, "lastTransitionTime")

    # ------------------------------------------------------------------------------------------------------- patches

    def start(self, record: Record, percent: int) -> Json:
        """A merge patch: the record, the version and its share, all at once, or all the traffic would move."""
        predictor: Json = {"canaryTrafficPercent": percent}
        predictor["containers"] = copy.deepcopy(self._predictor["containers"])  # a merge patch replaces lists whole
        container = _container(predictor)
        container["image"] = record.canary.image
        place, prefix = _place_of_model(container.get("args", []))
        if place is not None:
            container["args"][place] = prefix + record.canary.model
        return self._patch(predictor) | {"metadata": self._versioned(annotations={RECORD: record.model_dump_json()})}

    def shift(self, percent: int) -> Json:
        """A merge patch of the share alone; 100 is no share: that is how KServe promotes."""
        return self._patch({"canaryTrafficPercent": None if percent == 100 else percent})

    def _patch(self, predictor: Json) -> Json:
        return {"metadata": self._versioned(), "spec": {"predictor": predictor}}

    def _versioned(self, **metadata: Any) -> Json:
        """Whoever writes in between makes the patch fail (409) instead of being overwritten."""
        return {"resourceVersion": self._metadata["resourceVersion"], **metadata}

    @property
    def reference(self) -> Json:
        """What an Event points at, as the Python client spells its fields."""
        known: Json = {key: self._metadata[key] for key in ("name", "namespace", "uid") if key in self._metadata}
        return {"api_version": "serving.kserve.io/v1beta1", "kind": "InferenceService", **known}


def _container(predictor: Json) -> Json:
    containers: list[Json] = predictor.get("containers") or []
    named = [each for each in containers if each.get("name") == _CONTAINER] or containers[:1]
    if not named or "image" not in named[0]:
        raise ConfigurationError(f"the InferenceService has no container {_CONTAINER} with an image")
    return named[0]


def _place_of_model(args: list[str]) -> tuple[int | None, str]:
    """Where the value of `--model` stands, and what stands before it in the same argument."""
    for place, arg in enumerate(args):
        if arg.startswith("--model="):
            return place, "--model="
        if arg == "--model" and place + 1 < len(args):
            return place + 1, ""
    return None, ""


def _latest(entries: list[Json], key: str) -> datetime | None:
    """The latest of their times; what is no time is left out."""
    times = []
    for entry in entries:
        try:
            times.append(_TIME.validate_python(entry.get(key)))
        except ValidationError:
            continue
    return max(times, default=None)


def check_image(image: str) -> str:
    """`image` if it names a version; raises `ConfigurationError`."""
    found = _IMAGE.fullmatch(image)
    if found is None or not (found["tag"] or found["digest"]):
        raise ConfigurationError(f"--image must be REPO:TAG, got {image!r}")
    if found["tag"] == ":latest" and not found["digest"]:
        raise ConfigurationError("--image must not be tagged latest: a node that holds the old image would keep it")
    return image


def check_model(model: str, now_served: str) -> str:
    """`model` if it is NAME=SOURCE of the name that is served now; raises `ConfigurationError`."""
    name = now_served.partition("=")[0]
    if not model.startswith(f"{name}=") or model == f"{name}=" or not model.isprintable():
        raise ConfigurationError(f"--model must be {name}=SOURCE, since clients ask for {name}; got {model!r}")
    return model


def now() -> datetime:
    """The time, with its zone."""
    return datetime.now(timezone.utc)
