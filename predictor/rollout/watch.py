"""The rollout of one service: begun and ended by hand, watched in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from rich.console import Group

from predictor.errors import ConfigurationError
from predictor.rollout.cluster import Cluster, ClusterError, Conflict
from predictor.rollout.decide import Decision, decide
from predictor.rollout.evidence import Evidence, Seen, Shadow
from predictor.rollout.prometheus import Metrics, PrometheusUnavailable
from predictor.rollout.report import Look, report
from predictor.rollout.rules import Rules
from predictor.rollout.service import Json, Record, Service, Version, check_image, now
from predictor.rollout.shadow import ShadowUnavailable, compare


class Rollout:
    """Every method reads the service anew. With `dry_run` nothing is written."""

    def __init__(
        self, cluster: Cluster, metrics: Metrics, rules: Rules, tell: Callable[[str], None], *, dry_run: bool = False
    ) -> None:
        self._cluster, self._metrics, self._rules = cluster, metrics, rules
        self._tell, self._dry_run = tell, dry_run
        self._told = ""  # the last hold's reason: it is an Event once, not at every look
        self._split: tuple[str, int] = ("", 0)  # the newest revision and its share, as last seen
        self._split_since: datetime | None = None  # since when, where this process saw it change

    # ------------------------------------------------------------------------------------------------------ by hand

    def start(self, image: str, percent: int | None = None, model: str | None = None, interval_s: float = 10) -> None:
        """Apply the image, the weights if others are to be served, and the share (the first step's) in one patch.

        Where the newest revision that is ready is one that was rolled back, Knative would give it the share until the
        new one is ready: the image then goes out with 0%, and its share when it is ready, which is waited for here.
        A version that was rolled back, named again, gets its share again.

        Raises `ConfigurationError` where it could not work. A Prometheus that is away is told, no more.
        """
        service = self._cluster.read()
        percent = self._rules.steps[0] if percent is None else percent
        canary = self._startable(service, image, model)
        try:
            self._metrics.read(service.stable_revision, service.stable_revision, 1)
        except PrometheusUnavailable as error:
            self._tell(f"{error}; a watcher will hold until it does")
        if service.phase == "rolled back" and canary == service.version:
            self._share_when_ready(percent, interval_s)
            return
        record = Record(
            canary=canary,
            stable=_stable_version(service),
            stable_revision=service.stable_revision,
            newest_revision=service.newest_revision,
            started=now(),
        )
        before, after = record.stable.told_beside(canary), canary.told_beside(record.stable)
        message = f"{before} -> {after}, {percent}% of the traffic once it is ready"
        held_back = service.ready_revision != service.stable_revision
        self._write(service, service.start(record, 0 if held_back else percent), "Started", message)
        self._tell(message)
        if held_back and not self._dry_run:
            self._share_when_ready(percent, interval_s)

    def _startable(self, service: Service, image: str, model: str | None) -> Version:
        """The version to roll out, if it can be; raises `ConfigurationError`."""
        named = service.version
        if service.running:
            raise ConfigurationError(f"a rollout of {named.image} is at {service.percent}%; promote or abort it first")
        if service.mode in ("Standard", "RawDeployment"):
            raise ConfigurationError(f"the service is in {service.mode} mode, where canaryTrafficPercent does nothing")
        if not service.stable_revision:
            raise ConfigurationError("no revision has served yet, and the first one takes all the traffic; wait for it")
        if model is not None and not named.model:
            raise ConfigurationError("--model: the service's container has no --model to replace")
        canary = Version(image=check_image(image), model=named.model if model is None else model)
        if canary == named and service.phase != "rolled back":
            raise ConfigurationError(f"the service names {image} already; a new version needs a new tag")
        return canary

    def _share_when_ready(self, percent: int, interval_s: float) -> None:
        """Give the version that has 0% its share; raises `ConfigurationError` where it will not be ready."""
        began = time.monotonic()
        while True:
            service = self._cluster.read()
            record = service.record
            if record is None or service.phase != "rolled back":
                raise ConfigurationError("the service was changed by somebody else meanwhile; see `rollout status`")
            waited_s = time.monotonic() - began
            if service.canary_is_ready(record):
                break
            if (failure := service.failure(record)) is not None or waited_s > self._rules.ready_timeout_s:
                why = failure or f"not ready after {waited_s:.0f} s"
                raise ConfigurationError(f"{record.canary.image} got no traffic: {why}")
            self._tell(f"0% until {record.canary.image} is ready, after {waited_s:.0f} s")
            time.sleep(interval_s)
        message = f"{service.newest_revision} is ready and gets {percent}% of the traffic"
        self._write(service, service.shift(percent), "Shared", message)
        self._tell(message)

    def promote(self) -> None:
        """All the traffic to the newest revision, whoever began its canary."""
        service = self._split_service()
        if service.ready_revision != service.newest_revision:
            raise ConfigurationError(f"{service.version.image} is not ready yet; see `rollout status`")
        message = f"promoted by hand: {service.newest_revision} gets all the traffic"
        self._write(service, service.shift(100), "Promoted", message)
        self._tell(message)

    def abort(self) -> None:
        """All the traffic to the stable revision, whoever began the canary."""
        service = self._split_service()
        message = f"aborted by hand: {service.stable_revision} gets all the traffic"
        self._write(service, service.shift(0), "Aborted", message, warning=True)
        self._tell(message)

    def _split_service(self) -> Service:
        service = self._cluster.read()
        if service.percent in (0, 100):
            raise ConfigurationError("no canary has a share of the traffic; see `rollout status`")
        return service

    # ------------------------------------------------------------------------------------------------------ watched

    def watch(self, interval_s: float, *, forever: bool) -> Service:
        """Look and act until a rollout has ended, or `forever`; an API or a Prometheus that is away is waited for.

        Gives the service as it was when the rollout was found ended.
        """
        seen, idle = False, False
        while True:
            began = time.monotonic()
            try:
                service = self.step()
                if seen and not service.running and not forever:
                    self._tell(f"the rollout has ended: {service.phase}")
                    return service
                if not service.running and not idle:
                    self._tell("waiting for a rollout to start")
                seen, idle = seen or service.running, not service.running
            except Conflict as error:
                self._tell(f"{error}; looking again")
                continue
            except ClusterError as error:
                self._tell(str(error))
            time.sleep(max(interval_s - (time.monotonic() - began), 0))

    def step(self) -> Service:
        """Look once and do what follows; the service as it was found, or as it is after a change."""
        look = self.look()
        service, decision = look.service, look.decision
        if decision is None:
            return service
        self._tell(f"{service.percent}% {decision.action}: {decision.message}")
        if decision.action == "hold":
            if decision.kind != self._told:
                self._event(service, decision.kind, decision.message)
            self._told = decision.kind
            return service
        self._told = ""
        warning = decision.action == "rollback"
        self._write(service, service.shift(decision.percent), decision.kind, decision.message, warning=warning)
        return service if self._dry_run else self._cluster.read()

    def look(self) -> Look:
        """The service, the evidence where there is some, and what follows; writes nothing."""
        service = self._cluster.read()
        record = service.record
        self._note_split(service)
        if record is None or not service.running:
            return Look(service)
        if (failure := service.failure(record)) is not None:
            message = f"rolled back: {service.newest_revision} failed: {failure}"
            return Look(service, None, Decision("rollback", "RevisionFailed", message, 0))
        if service.phase == "waiting":
            return Look(service, None, self._wait_for(service, record))
        return self._compare(service, record)

    def _note_split(self, service: Service) -> None:
        split = service.newest_revision if service.phase == "comparing" else "", service.percent
        if split != self._split:
            # The first look of a process does not know for how long it has been so.
            self._split_since = now() if self._split[1] else None
            self._split = split

    def _wait_for(self, service: Service, record: Record) -> Decision:
        waited_s = (now() - record.started).total_seconds()
        if waited_s > self._rules.ready_timeout_s and not service.canary_is_ready(record):
            return Decision("rollback", "NotReady", f"rolled back: not ready after {waited_s:.0f} s", 0)
        message = f"{record.canary.image} is not ready yet, after {waited_s:.0f} s"
        return Decision("hold", "Waiting", message, service.percent)

    def _compare(self, service: Service, record: Record) -> Look:
        since = service.since or self._split_since or record.started
        step_s = max((now() - since).total_seconds(), 0)
        revisions = record.stable_revision, service.newest_revision
        shadow: Shadow | None = None
        unavailable: tuple[str, str] | None = None
        if self._rules.shadow is not None:
            try:
                shadow = compare(self._rules.shadow, self._cluster.name, *map(service.url_of, revisions))
            except ShadowUnavailable as error:
                unavailable = "ShadowUnavailable", str(error)
        stable = canary = Seen()
        try:
            stable, canary = self._metrics.read(*revisions, step_s)
        except PrometheusUnavailable as error:
            unavailable = "PrometheusUnavailable", str(error)
        evidence = Evidence(stable, canary, shadow)
        decision = decide(service.percent, step_s, evidence, self._rules)
        # What is known may be enough to go back, never enough to go on.
        if unavailable is not None and (decision.action != "rollback" or decision.kind == "Undecided"):
            return Look(service, None, Decision("hold", *unavailable, service.percent))
        return Look(service, evidence, decision)

    def report(self) -> Group:
        """What `rollout status` prints."""
        return report(self.look(), self._cluster.told(), self._rules)

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self, service: Service, patch: Json, kind: str, message: str, *, warning: bool = False) -> None:
        if self._dry_run:
            self._tell(f"dry run, not sent: {patch['spec']['predictor']}")
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


def _stable_version(service: Service) -> Version:
    """The version that has the traffic now; raises `ConfigurationError` where two have some."""
    if service.percent == 100:
        return service.version
    if service.percent == 0 and service.record is not None:  # rolled back: the service still names what failed
        return service.record.stable
    raise ConfigurationError(
        f"{service.version.image} has {service.percent}% of the traffic, by hand; promote or abort it first, and remove "
        "canaryTrafficPercent once the version to keep has been applied"
    )
