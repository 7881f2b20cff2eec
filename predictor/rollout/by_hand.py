"""What a person does to a rollout: begin it, give it everything, take everything back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from predictor.errors import ConfigurationError
from predictor.rollout.cluster import Cluster, ClusterError, Conflict
from predictor.rollout.prometheus import Metrics, PrometheusUnavailable
from predictor.rollout.rules import Rules
from predictor.rollout.service import Json, Record, Service, Version, check_image, check_model, now

T = TypeVar("T")

# KServe writes its status whenever something moves, and each write makes a patch that was read before fail.
_TRIES = 5
_BETWEEN_TRIES_S = 0.2


class ByHand:
    """Every method reads the service anew. With `dry_run` nothing is written."""

    def __init__(
        self, cluster: Cluster, metrics: Metrics, rules: Rules, tell: Callable[[str], None], *, dry_run: bool = False
    ) -> None:
        self._cluster, self._metrics, self._rules = cluster, metrics, rules
        self._tell, self._dry_run = tell, dry_run

    def start(self, image: str, percent: int | None = None, model: str | None = None, interval_s: float = 10) -> None:
        """Apply the image, the weights if others are to be served, and the share (the first step's) in one patch.

        Where the newest revision that is ready is one that was rolled back, Knative would give it the share until the
        new one is ready: the image then goes out with 0%, and its share when it is ready, which is waited for here.
        A version that was rolled back, named again, gets its share again.

        Raises `ConfigurationError` where it could not work. A Prometheus that is away is told, no more.
        """
        share = self._rules.steps[0] if percent is None else percent
        stable = self._cluster.read().stable_revision
        try:
            self._metrics.read(stable, stable, 1)
        except PrometheusUnavailable as error:
            self._tell(f"{error}; a watcher will hold until it does")
        waited_for = self._insist(lambda: self._start(image, share, model))
        if waited_for is not None and not self._dry_run:
            self._share_when_ready(waited_for, share, interval_s)

    def _start(self, image: str, percent: int, model: str | None) -> Version | None:
        """Send a version out; give it back where its share has to wait until it is ready."""
        service = self._cluster.read()
        stable, canary = _startable(service, image, model)
        if canary == service.version:  # rolled back before
            return canary
        record = Record(
            canary=canary,
            stable=stable,
            stable_revision=service.stable_revision,
            newest_revision=service.newest_revision,
            started=now(),
        )
        held_back = service.ready_revision != service.stable_revision
        message = (
            f"{stable.told_beside(canary)} -> {canary.told_beside(stable)}, {percent}% of the traffic once it is ready"
        )
        self._write(service, service.start(record, 0 if held_back else percent), "Started", message)
        self._tell(message)
        return canary if held_back else None

    def _share_when_ready(self, canary: Version, percent: int, interval_s: float) -> None:
        """Give the version that has 0% its share; raises `ConfigurationError` where it will not be ready."""
        began = time.monotonic()
        while True:
            try:
                service = self._cluster.read()
                record = service.record
                if record is None or record.canary != canary or service.phase != "rolled back":
                    raise ConfigurationError("the service was changed by somebody else meanwhile; see `rollout status`")
                waited_s = time.monotonic() - began
                if service.canary_is_ready(record):
                    message = f"{service.newest_revision} is ready and gets {percent}% of the traffic"
                    self._write(service, service.shift(percent), "Shared", message)
                    self._tell(message)
                    return
                failure = service.failure if service.canary_is_made(record) else None
                if failure is not None or waited_s > self._rules.ready_timeout_s:
                    why = failure or f"not ready after {waited_s:.0f} s"
                    raise ConfigurationError(f"{canary.image} got no traffic: {why}")
                self._tell(f"0% until {canary.image} is ready, after {waited_s:.0f} s")
            except ClusterError as error:
                self._tell(str(error))
            time.sleep(interval_s)

    def promote(self) -> Service:
        """All the traffic to the newest revision, whoever began its canary; the service as it was before."""

        def promote() -> Service:
            service = self._split_service()
            if service.ready_revision != service.newest_revision or service.failure is not None:
                raise ConfigurationError(f"{service.version.image} is not ready; see `rollout status`")
            message = f"promoted by hand: {service.newest_revision} gets all the traffic"
            self._write(service, service.shift(100), "Promoted", message)
            self._tell(message)
            return service

        return self._insist(promote)

    def abort(self) -> Service:
        """All the traffic to the stable revision, whoever began the canary; the service as it was before."""

        def abort() -> Service:
            service = self._split_service()
            message = f"aborted by hand: {service.stable_revision} gets all the traffic"
            self._write(service, service.shift(0), "Aborted", message, warning=True)
            self._tell(message)
            return service

        return self._insist(abort)

    def follow(self, revision: str, interval_s: float) -> None:
        """Wait until KServe reports that a revision has all the traffic; raises `ConfigurationError` if it does not."""
        began = time.monotonic()
        while (traffic := self._cluster.read().traffic) and any(share for each, share in traffic if each != revision):
            waited_s = time.monotonic() - began
            told = ", ".join(f"{each} {share}%" for each, share in traffic)
            if waited_s > self._rules.ready_timeout_s:
                raise ConfigurationError(f"{revision} does not have all the traffic after {waited_s:.0f} s: {told}")
            self._tell(told)
            time.sleep(interval_s)
        self._tell(f"{revision} has all the traffic")

    def _split_service(self) -> Service:
        service = self._cluster.read()
        if service.percent in (0, 100):
            raise ConfigurationError("no canary has a share of the traffic; see `rollout status`")
        return service

    def _insist(self, work: Callable[[], T]) -> T:
        """Do it again where somebody else wrote between its read and its patch."""
        for _ in range(_TRIES - 1):
            try:
                return work()
            except Conflict:
                time.sleep(_BETWEEN_TRIES_S)
        return work()

    def _write(self, service: Service, patch: Json, kind: str, message: str, *, warning: bool = False) -> None:
        if self._dry_run:
            share = patch["spec"]["predictor"]["canaryTrafficPercent"]
            self._tell(f"dry run, not sent: canaryTrafficPercent {'removed' if share is None else share}")
            return
        self._cluster.patch(patch)
        self._event(service, kind, message, warning=warning)

    def _event(self, service: Service, kind: str, message: str, *, warning: bool = False) -> None:
        if self._dry_run:
            return
        try:
            self._cluster.tell(service, kind, message, warning=warning)
        except ClusterError as error:  # the rollout matters more than its tale
            self._tell(str(error))


def _startable(service: Service, image: str, model: str | None) -> tuple[Version, Version]:
    """The version that has the traffic, and the one to roll out; raises `ConfigurationError` where it cannot be."""
    named = service.version
    if service.running:
        raise ConfigurationError(f"a rollout of {named.image} is at {service.percent}%; promote or abort it first")
    if service.mode in ("Standard", "RawDeployment"):
        raise ConfigurationError(f"the service is in {service.mode} mode, where canaryTrafficPercent does nothing")
    if not service.stable_revision:
        raise ConfigurationError("no revision has served yet, and the first one takes all the traffic; wait for it")
    if model is not None and not named.model:
        raise ConfigurationError("--model: the service's container has no --model to replace")
    image = check_image(image)
    if service.percent == 100:
        # Until KServe has seen it through, 0% of the next version would bring the version before back.
        if not service.newest_revision == service.ready_revision == service.stable_revision:
            raise ConfigurationError("the last change has not all the traffic yet; see `rollout status`, and wait")
        stable = named
    elif service.percent == 0 and service.record is not None:  # rolled back: the service still names what failed
        stable = service.record.stable
    else:
        raise ConfigurationError(
            f"{named.image} has {service.percent}% of the traffic, by hand; promote or abort it first, and remove "
            "canaryTrafficPercent once the version to keep has been applied"
        )
    again = service.phase == "rolled back" and image == named.image
    if model is not None:
        model = check_model(model, named.model)
    canary = Version(image=image, model=model or (named if again else stable).model)
    if canary == stable or (canary == named and not again):
        raise ConfigurationError(f"{image} has the traffic already; a new version needs a new tag")
    return stable, canary
