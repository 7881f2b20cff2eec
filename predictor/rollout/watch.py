"""The rollout of one service: begun and ended by hand, watched in between. All it knows is in the annotation."""

from __future__ import annotations

import time
from collections.abc import Callable

from predictor.errors import ConfigurationError
from predictor.rollout.cluster import Cluster, ClusterError, Conflict
from predictor.rollout.decide import Decision, decide
from predictor.rollout.evidence import Evidence, Shadow, Version
from predictor.rollout.prometheus import Metrics, PrometheusUnavailable
from predictor.rollout.rules import Rules
from predictor.rollout.service import Json, Phase, Service, State, check_image, now
from predictor.rollout.shadow import ShadowUnavailable, compare

_AFTER: dict[str, Phase] = {"step": "comparing", "promote": "promoted", "rollback": "rolled back"}


class Rollout:
    """Every method reads the service anew. With `dry_run` nothing is written."""

    def __init__(
        self, cluster: Cluster, metrics: Metrics, rules: Rules, tell: Callable[[str], None], *, dry_run: bool = False
    ) -> None:
        self._cluster, self._metrics, self._rules = cluster, metrics, rules
        self._tell, self._dry_run = tell, dry_run
        self._last_hold = ""  # a reason to hold is an Event once, not at every look

    # ------------------------------------------------------------------------------------------------------ by hand

    def start(self, image: str, percent: int | None) -> None:
        """Apply the image and its share (by default the first step's) in one patch.

        Raises `ConfigurationError` where it could not work. A Prometheus that is away is told, no more.
        """
        service = self._cluster.read()
        percent = self._rules.steps[0] if percent is None else percent
        state = service.state
        if state is not None and state.running:
            raise ConfigurationError(f"a rollout of {state.image} is at {state.percent}%; promote or abort it first")
        if service.mode in ("Standard", "RawDeployment"):
            raise ConfigurationError(f"the service is in {service.mode} mode, where canaryTrafficPercent does nothing")
        if not service.stable_revision:
            raise ConfigurationError("no revision has served yet, and the first one takes all the traffic; wait for it")
        if service.image == check_image(image):
            raise ConfigurationError(f"the service runs {image} already; a new version needs a new tag")
        if service.percent in (None, 100):
            stable_image = service.image
        elif service.percent == 0 and state is not None:  # rolled back: the service still names the image that failed
            stable_image = state.stable_image
        else:
            raise ConfigurationError(
                f"{service.image} has {service.percent}% of the traffic; give it all or none first"
            )
        begun = State(
            phase="waiting",
            image=image,
            stable_image=stable_image,
            stable_revision=service.stable_revision,
            newest_revision=service.newest_revision,
            percent=percent,
            since=now(),
        )
        try:
            self._metrics.read(service.stable_revision, service.stable_revision, 1)
        except PrometheusUnavailable as error:
            self._tell(f"{error}; a watcher will hold until it does")
        message = f"{stable_image} -> {image}, {percent}% of the traffic once it is ready"
        begun = begun.moved("waiting", percent, message)
        self._write(service, service.shift(begun, image=image), "Started", message)
        self._tell(message)

    def promote(self) -> None:
        """All the traffic to the canary."""
        service, state = self._running()
        if not _is_ready(service, state):
            raise ConfigurationError(f"{state.image} is not ready yet; see `rollout status`")
        message = f"promoted by hand: {state.image} gets all the traffic"
        self._write(service, service.shift(state.moved("promoted", 100, message)), "Promoted", message)
        self._tell(message)

    def abort(self) -> None:
        """All the traffic to the stable version."""
        service, state = self._running()
        message = f"aborted by hand: {state.stable_image} gets all the traffic"
        self._write(service, service.shift(state.moved("aborted", 0, message)), "Aborted", message, warning=True)
        self._tell(message)

    def _running(self) -> tuple[Service, State]:
        service = self._cluster.read()
        state = service.state
        if state is None or not state.running:
            raise ConfigurationError("no rollout is running; see `rollout status`")
        return service, state

    # ------------------------------------------------------------------------------------------------------ watched

    def watch(self, interval_s: float, *, forever: bool) -> State:
        """Look and act until a rollout has ended, or `forever`; an API or a Prometheus that is away is waited for."""
        seen, idle = False, False
        while True:
            began = time.monotonic()
            try:
                state = self.step()
                running = state is not None and state.running
                if state is not None and seen and not running and not forever:
                    return state
                if not running and not idle:
                    self._tell("waiting for a rollout to start")
                seen, idle = seen or running, not running
            except Conflict as error:
                self._tell(f"{error}; looking again")
            except ClusterError as error:
                self._tell(str(error))
            time.sleep(max(interval_s - (time.monotonic() - began), 0))

    def step(self) -> State | None:
        """Look once and do what follows; the state after it, None where there never was a rollout."""
        service, state, _, decision = self.look()
        if state is None or decision is None:
            return state
        self._tell(f"{state.percent}% {decision.action}: {decision.message}")
        if decision.kind == "Ready":
            after = state.moved("comparing", state.percent, decision.message, service.newest_revision)
            return self._apply(service, after, service.note(after), decision)
        if decision.kind == "TakenOver":
            after = state.moved("aborted", decision.percent, decision.message)
            return self._apply(service, after, service.note(after), decision)
        if decision.action == "hold":
            if decision.kind != self._last_hold:
                self._event(service, decision.kind, decision.message)
            self._last_hold = decision.kind
            return state
        after = state.moved(_AFTER[decision.action], decision.percent, decision.message)
        return self._apply(service, after, service.shift(after), decision)

    def look(self) -> tuple[Service, State | None, Evidence | None, Decision | None]:
        """The service, its rollout, the evidence where there is some, and what follows; writes nothing."""
        service = self._cluster.read()
        state = service.state
        if state is None or not state.running:
            return service, state, None, None
        if (ended := _ended_by_others(service, state)) is not None:
            return service, state, None, ended
        if state.phase == "waiting":
            return service, state, None, self._wait_for(service, state)
        evidence, decision = self._compare(service, state)
        return service, state, evidence, decision

    def _wait_for(self, service: Service, state: State) -> Decision:
        waited_s = (now() - state.since).total_seconds()
        if _is_ready(service, state) and service.has_share(service.newest_revision, state.percent):
            message = f"{service.newest_revision} is ready and has {state.percent}% of the traffic"
            return Decision("hold", "Ready", message, state.percent)
        if waited_s > self._rules.ready_timeout_s:
            return Decision("rollback", "NotReady", f"rolled back: not ready after {waited_s:.0f} s", 0)
        message = f"{state.image} is not ready yet, after {waited_s:.0f} s"
        return Decision("hold", "Waiting", message, state.percent)

    def _compare(self, service: Service, state: State) -> tuple[Evidence | None, Decision]:
        shadow: Shadow | None = None
        step_s = (now() - state.since).total_seconds()
        unavailable: tuple[str, str] | None = None
        if self._rules.shadow is not None:
            urls = service.url_of(state.stable_revision), service.url_of(state.canary_revision)
            try:
                shadow = compare(self._rules.shadow, self._cluster.name, *urls)
            except ShadowUnavailable as error:
                unavailable = "ShadowUnavailable", str(error)
        stable = canary = Version()
        try:
            stable, canary = self._metrics.read(state.stable_revision, state.canary_revision, step_s)
        except PrometheusUnavailable as error:
            unavailable = "PrometheusUnavailable", str(error)
        evidence = Evidence(stable, canary, shadow)
        decision = decide(state.percent, step_s, evidence, self._rules)
        # What is known may be enough to go back, never enough to go on.
        if unavailable is not None and (decision.action != "rollback" or decision.kind == "Undecided"):
            return None, Decision("hold", *unavailable, state.percent)
        return evidence, decision

    # ------------------------------------------------------------------------------------------------------- writing

    def _apply(self, service: Service, after: State, patch: Json, decision: Decision) -> State:
        self._last_hold = ""
        warning = decision.action == "rollback" or decision.kind == "TakenOver"
        self._write(service, patch, decision.kind, decision.message, warning=warning)
        return after

    def _write(self, service: Service, patch: Json, kind: str, message: str, *, warning: bool = False) -> None:
        if self._dry_run:
            self._tell(f"dry run, not sent: {patch.get('spec', {'predictor': {}})['predictor']}")
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


def _is_ready(service: Service, state: State) -> bool:
    """Whether the canary's revision has been made and serves."""
    newest = service.newest_revision
    return newest not in (state.newest_revision, state.stable_revision) and service.is_ready(newest)


def _ended_by_others(service: Service, state: State) -> Decision | None:
    """A canary that Knative has given up, or a service that somebody changed by hand."""
    if service.image != state.image or service.percent != state.percent:
        share = 100 if service.percent is None else service.percent
        message = f"changed by hand to {service.image} at {share}%: this rollout ends and leaves it so"
        return Decision("hold", "TakenOver", message, share)
    newest = service.newest_revision
    if service.failure is not None and newest not in (state.newest_revision, state.stable_revision):
        return Decision("rollback", "RevisionFailed", f"rolled back: {newest} failed: {service.failure}", 0)
    return None
