"""The InferenceService as the API gives it: what a rollout reads of it, and the patches it sends. Pure."""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from predictor.errors import ConfigurationError

Json = dict[str, Any]
Phase = Literal["waiting", "comparing", "promoted", "rolled back", "aborted"]

STATE = "rollout.gpt2-predictor/state"
_MODE = "serving.kserve.io/deploymentMode"
_CONTAINER = "kserve-container"
_HISTORY = 20  # entries kept: an annotation is no log, and a rollout has about six


class Entry(BaseModel):
    """One change, for people."""

    model_config = ConfigDict(frozen=True)

    time: datetime
    percent: int
    message: str


class State(BaseModel):
    """Where a rollout stands. It lives in an annotation of the service, so a watcher needs no memory of its own."""

    model_config = ConfigDict(frozen=True)

    phase: Phase
    image: str
    stable_image: str
    stable_revision: str
    newest_revision: str  # when it started: the canary's is a later one
    canary_revision: str = ""  # known once it is ready
    percent: int
    since: datetime  # when this step, or the waiting, began
    history: tuple[Entry, ...] = ()

    @property
    def running(self) -> bool:
        return self.phase in ("waiting", "comparing")

    def moved(self, phase: Phase, percent: int, message: str, canary_revision: str = "") -> State:
        """The state after a change that is made now, which the history tells."""
        entry = Entry(time=now(), percent=percent, message=message)
        return self.model_copy(
            update={
                "phase": phase,
                "percent": percent,
                "since": entry.time,
                "canary_revision": canary_revision or self.canary_revision,
                "history": (*self.history, entry)[-_HISTORY:],
            }
        )


class Service:
    """One InferenceService in Knative mode, as it was read."""

    def __init__(self, found: Json) -> None:
        self._metadata: Json = found["metadata"]
        self._predictor: Json = found["spec"]["predictor"]
        status = found.get("status", {})
        self._conditions: list[Json] = status.get("conditions", [])
        self._component: Json = status.get("components", {}).get("predictor", {})

    @property
    def resource_version(self) -> str:
        return str(self._metadata["resourceVersion"])

    @property
    def reference(self) -> Json:
        """What an Event points at, as the Python client spells its fields."""
        known: Json = {key: self._metadata[key] for key in ("name", "namespace", "uid") if key in self._metadata}
        return {"api_version": "serving.kserve.io/v1beta1", "kind": "InferenceService", **known}

    @property
    def state(self) -> State | None:
        """The rollout's; raises `ConfigurationError` where the annotation is none of ours."""
        text = self._metadata.get("annotations", {}).get(STATE)
        try:
            return None if text is None else State.model_validate_json(text)
        except ValidationError as error:
            raise ConfigurationError(f"the annotation {STATE} cannot be read; remove it and start again") from error

    @property
    def image(self) -> str:
        return str(self._container(self._predictor)["image"])

    @property
    def percent(self) -> int | None:
        """The canary's share as asked for; None: all the traffic goes to the newest revision."""
        return self._predictor.get("canaryTrafficPercent")

    @property
    def stable_revision(self) -> str:
        """The last revision that had all the traffic; empty before the first is ready."""
        return str(self._component.get("latestRolledoutRevision", ""))

    @property
    def newest_revision(self) -> str:
        """The revision made last, whether or not it is ready."""
        return str(self._component.get("latestCreatedRevision", ""))

    @property
    def mode(self) -> str:
        return str(self._metadata.get("annotations", {}).get(_MODE, ""))

    def is_ready(self, revision: str) -> bool:
        return bool(revision) and self._component.get("latestReadyRevision") == revision

    def has_share(self, revision: str, percent: int) -> bool:
        """Whether the traffic is split as asked."""
        return any(
            each.get("revisionName") == revision and each.get("percent", 0) == percent
            for each in self._component.get("traffic", [])
        )

    def url_of(self, revision: str) -> str | None:
        """A revision's own address, which it has with tag routing."""
        urls = [
            each["url"]
            for each in self._component.get("traffic", [])
            if each.get("revisionName") == revision and "url" in each
        ]
        return urls[0] if urls else None

    @property
    def failure(self) -> str | None:
        """Why the newest revision will not become ready, in Knative's words."""
        for condition in self._conditions:
            if condition.get("status") == "False" and condition.get("reason") == "RevisionFailed":
                return str(condition.get("message", "RevisionFailed"))
        return None

    @property
    def traffic(self) -> list[tuple[str, int]]:
        """Revisions and their shares, as KServe reports them."""
        return [
            (str(each.get("revisionName", "")), int(each.get("percent") or 0))
            for each in self._component.get("traffic", [])
        ]

    @staticmethod
    def _container(predictor: Json) -> Json:
        containers: list[Json] = predictor.get("containers") or []
        named = [each for each in containers if each.get("name") == _CONTAINER] or containers[:1]
        if not named or "image" not in named[0]:
            raise ConfigurationError(f"the InferenceService has no container {_CONTAINER} with an image")
        return named[0]

    def note(self, state: State) -> Json:
        """A merge patch that writes down `state` and changes nothing else.

        Like the next one it carries the resourceVersion that was read: whoever writes in between makes it fail (409)
        instead of being overwritten.
        """
        annotations = {STATE: state.model_dump_json()}
        return {"metadata": {"resourceVersion": self.resource_version, "annotations": annotations}}

    def shift(self, state: State, *, image: str | None = None) -> Json:
        """A merge patch that brings the traffic to `state`; image and share go together."""
        predictor: Json = {"canaryTrafficPercent": None if state.phase == "promoted" else state.percent}
        if image is not None:  # a merge patch replaces a list as a whole
            predictor["containers"] = copy.deepcopy(self._predictor["containers"])
            self._container(predictor)["image"] = image
        return self.note(state) | {"spec": {"predictor": predictor}}


def check_image(image: str) -> str:
    """`image` if it names a version; raises `ConfigurationError`."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not tag and not digest:
        raise ConfigurationError(f"--image must be REPO:TAG, got {image}")
    if tag == "latest" and not digest:
        raise ConfigurationError("--image must not be tagged latest: a node that holds the old image would keep it")
    return image


def now() -> datetime:
    return datetime.now(timezone.utc)
