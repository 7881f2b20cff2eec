"""The rollout of one service, watched: look, decide, act, again."""

from __future__ import annotations

import time
from datetime import datetime

from rich.console import Group

from predictor.rollout.by_hand import ByHand
from predictor.rollout.cluster import ClusterError, Conflict
from predictor.rollout.decide import Decision, decide
from predictor.rollout.evidence import Evidence, Seen, Shadow
from predictor.rollout.prometheus import PrometheusUnavailable
from predictor.rollout.report import Look, report
from predictor.rollout.service import Record, Service, now
from predictor.rollout.shadow import ShadowUnavailable, compare

# After another writer was first: soon, but not at once again and again.
_AFTER_A_CONFLICT_S = 1.0


class Rollout(ByHand):
    """By hand and watched. What a watcher remembers only spares it questions: another may take over at any time."""

    _told = ""  # the last hold's reason: it is an Event once, not at every look
    _split: tuple[str, int] | None = None  # the revision that has a share beside the stable one, and its share
    _looked_at: datetime | None = None  # when the last look began
    _split_since: datetime | None = None  # when this process last saw another split; None: it saw none
    _shadow: tuple[tuple[str, int], Shadow] | None = None  # of a split: the same question has the same answer

    def watch(self, interval_s: float, *, forever: bool) -> Service:
        """Look and act until the rollout has ended, or `forever`; an API or a Prometheus that is away is waited for.

        Gives the service as it was when the rollout was found ended. Where none was ever started it waits for one.
        """
        idle = ""
        while True:
            began, pause_s = time.monotonic(), interval_s
            try:
                service = self.step()
                if service.phase is not None and not service.running and not forever:
                    self._tell(f"the rollout has ended: {service.phase}")
                    return service
                before, idle = idle, _why_idle(service)
                if idle and idle != before:
                    self._tell(idle)
            except Conflict as error:
                self._tell(f"{error}; looking again")
                pause_s = min(interval_s, _AFTER_A_CONFLICT_S)
            except ClusterError as error:
                self._tell(str(error))
            time.sleep(max(pause_s - (time.monotonic() - began), 0))

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
        looked_at = now()
        service = self._cluster.read()
        canary = "" if service.record is None else service.sharing_beside(service.record.stable_revision)
        self._note_split((canary, service.percent), looked_at)
        return self.judge(service)

    def judge(self, service: Service) -> Look:
        """The evidence on a service as it was read, and what follows from it."""
        record = service.record
        if record is None or not service.running:
            return Look(service)
        canary = service.sharing_beside(record.stable_revision)
        if service.failure is not None and service.canary_is_made(record):
            message = f"{service.percent}% -> 0%; {service.newest_revision} failed: {service.failure}"
            return Look(service, None, Decision("rollback", "RevisionFailed", message, 0))
        if service.phase == "comparing":
            return self._compare(service, record, canary)
        waiting = self._wait_for(service, record)
        if canary and waiting.action == "hold":  # some revision has traffic that was not asked for now: it may be bad
            look = self._compare(service, record, canary)
            if look.decision is not None and look.decision.action == "rollback":
                return look
        return Look(service, None, waiting)

    def report(self) -> Group:
        """What `rollout status` prints."""
        try:
            events = self._cluster.told()
        except ClusterError as error:  # this account may not list them
            events = [(now(), str(error))]
        return report(self.look(), events, self._rules)

    def _note_split(self, split: tuple[str, int], looked_at: datetime) -> None:
        if self._split not in (None, split):
            self._split_since = self._looked_at  # it changed since then
        self._split, self._looked_at = split, looked_at

    def _wait_for(self, service: Service, record: Record) -> Decision:
        waited_s = (now() - max(record.started, service.shared_at or record.started)).total_seconds()
        if waited_s > self._rules.ready_timeout_s and not service.canary_is_ready(record):
            message = f"{service.percent}% -> 0%; not ready after {waited_s:.0f} s"
            return Decision("rollback", "NotReady", message, 0)
        message = f"{record.canary.image} does not have its share yet, after {waited_s:.0f} s"
        return Decision("hold", "Waiting", message, service.percent)

    def _compare(self, service: Service, record: Record, canary: str) -> Look:
        # This process's own clock where it saw the split change; else the API server's books.
        since = self._split_since or service.shared_at or record.started
        step_since = self._split_since or max(since, service.ready_since or since)
        evidence_s, step_s = ((now() - each).total_seconds() for each in (since, step_since))
        revisions = record.stable_revision, canary
        unavailable: tuple[str, str] | None = None
        stable = seen = Seen()
        try:
            stable, seen = self._metrics.read(*revisions, evidence_s)
        except PrometheusUnavailable as error:
            unavailable = "PrometheusUnavailable", str(error)
        evidence = Evidence(stable, seen)
        decision = decide(service.percent, step_s, evidence, self._rules)
        if decision.action != "rollback" and self._rules.shadow is not None:
            try:
                evidence = Evidence(stable, seen, self._ask_both(service, record, canary))
                decision = decide(service.percent, step_s, evidence, self._rules)
            except ShadowUnavailable as error:
                unavailable = "ShadowUnavailable", str(error)
        # What is known may be enough to go back, never enough to go on.
        if unavailable is not None and (decision.action != "rollback" or decision.kind == "Undecided"):
            return Look(service, None, Decision("hold", *unavailable, service.percent))
        return Look(service, evidence, decision)

    def _ask_both(self, service: Service, record: Record, canary: str) -> Shadow:
        """The shadow of this split: asked once, since its answers count as traffic."""
        assert self._rules.shadow is not None
        split = canary, service.percent
        if self._shadow is None or self._shadow[0] != split:
            urls = service.url_of(record.stable_revision), service.url_of(canary)
            self._shadow = split, compare(self._rules.shadow, self._cluster.name, *urls)
        return self._shadow[1]


def _why_idle(service: Service) -> str:
    """Why there is nothing to do; empty while there is."""
    if service.running:
        return ""
    if service.percent in (0, 100):
        return "waiting for a rollout to start"
    return f"{service.version.image} has {service.percent}% of the traffic, and no rollout is recorded: not watched"
