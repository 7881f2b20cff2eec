"""The decision: a pure function of the step, the evidence and the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from predictor.rollout.evidence import Evidence, Histogram
from predictor.rollout.rules import Rules
from predictor.rollout.statistics import Share, bounds

Action = Literal["hold", "step", "promote", "rollback"]
Verdict = Literal["worse", "as good", "unclear"]

# What is slow is told by the stable version's own tail. Where that is long, half of a canary's answers may be three
# times as slow and not reach it: so the median is looked at too, but only to go back.
_TAIL, _MEDIAN = 0.95, 0.5


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why in one line. `kind` is the stable name of the reason, of a Kubernetes Event too."""

    action: Action
    kind: str
    message: str
    percent: int  # of the traffic, for the canary, once this is applied


@dataclass(frozen=True, slots=True)
class Check:
    """Is the canary's share of bad answers more than `margin` above the stable version's?"""

    name: str
    canary: Share
    stable: Share
    margin: float
    needed: bool = True  # to go on; else it can only send the canary back

    def verdict(self, promote_risk: float, rollback_risk: float) -> Verdict:
        """The risks are those of a wrong "as good" and of a wrong "worse", over every look."""
        if self._lowest(rollback_risk) > self.margin:
            return "worse"
        if self._highest(promote_risk) < self.margin:
            return "as good"
        return "unclear"

    def _lowest(self, risk: float) -> float:
        """The least by which the canary's share is higher."""
        return bounds(self.canary, risk / 2)[0] - bounds(self.stable, risk / 2)[1]

    def _highest(self, risk: float) -> float:
        return bounds(self.canary, risk / 2)[1] - bounds(self.stable, risk / 2)[0]

    def __str__(self) -> str:
        return f"{self.name} {self.canary}, stable {self.stable}"


def checks(evidence: Evidence, rules: Rules) -> Iterator[Check]:
    """Every comparison of the two versions that the rules ask for and that has something to compare."""
    stable, canary = evidence.stable, evidence.canary
    yield Check("errors", canary.errors, stable.errors, rules.max_error_increase)
    yield from _slow("time to first token", canary.ttft_s, stable.ttft_s, rules.max_ttft_ratio, rules)
    if canary.itl_s.total or stable.itl_s.total:  # else no answer has had two tokens
        yield from _slow("time between tokens", canary.itl_s, stable.itl_s, rules.max_itl_ratio, rules)
    if rules.reward is not None:
        nothing = Share(0, 0)
        yield Check("missing reward", canary.reward or nothing, stable.reward or nothing, rules.reward.max_drop)


def _slow(name: str, canary: Histogram, stable: Histogram, ratio: float, rules: Rules) -> Iterator[Check]:
    common = [bound for bound in stable.bounds if bound in canary.at_most]
    if not common or not stable.total:
        yield Check(f"{name} in", Share(0, 0), Share(0, 0), rules.max_slow_increase)
        return
    tail, median = (
        next((each for each in common if each >= ratio * stable.quantile(quantile)), common[-1])
        for quantile in (_TAIL, _MEDIAN)
    )
    for bound in sorted({tail, median}, reverse=True):
        text = f"{name} past {1000 * bound:.3g} ms in"
        yield Check(text, canary.past(bound), stable.past(bound), rules.max_slow_increase, bound == tail)


def decide(percent: int, step_s: float, evidence: Evidence, rules: Rules) -> Decision:
    """What follows from the evidence of a step that gives the canary `percent` and has lasted `step_s` seconds.

    Nothing is held against a canary that chance could have done, but for an error or a shadow difference, which the
    stable version does not show: there the first one is enough, since a rollback is cheap. More traffic takes
    proof that no share of bad answers is more than its margin above the stable version's.
    """
    shadow, canary, stable = evidence.shadow, evidence.canary.errors, evidence.stable.errors
    if shadow is not None and rules.shadow is not None and shadow.equal < rules.shadow.min_agreement * shadow.prompts:
        text = f"{shadow.equal} of {shadow.prompts} seeded prompts answered alike, {shadow.first_difference} differs"
        return _roll_back(percent, "ShadowDiffers", text)
    if canary.bad > rules.tolerated_errors and not stable.bad:
        text = f"errors {canary.bad:.0f} of {canary.total:.0f}, stable 0 of {stable.total:.0f}"
        return _roll_back(percent, "Errors", text)
    asked = list(checks(evidence, rules))
    needed = [check for check in asked if check.needed]
    # Bonferroni: a bad canary may pass by any check at any step.
    promote_risk = rules.promote_risk / (len(needed) * (len(rules.steps) - 1))
    verdicts = {check: check.verdict(promote_risk, rules.rollback_risk) for check in asked}
    for check, verdict in verdicts.items():
        if verdict == "worse":
            return _roll_back(percent, "Worse", str(check))
    told = "; ".join(map(str, needed))
    unclear = [check for check in needed if verdicts[check] == "unclear"]
    fewest = min(canary.total, stable.total)
    if fewest < rules.min_samples or unclear:
        if rules.step_timeout_s is not None and step_s >= rules.step_timeout_s:
            return _roll_back(percent, "Undecided", f"nothing decided in {step_s:.0f} s; {told}")
        if fewest < rules.min_samples:
            text = f"{canary.total:.0f} answers of the canary and {stable.total:.0f} of the stable version"
            return Decision("hold", "TooFewSamples", f"{text}, of {rules.min_samples} each", percent)
        return Decision("hold", "Unclear", f"not yet sure of {unclear[0]}", percent)
    if step_s < rules.min_step_s:
        return Decision("hold", "StepLasts", f"{step_s:.0f} of {rules.min_step_s:.0f} s at this step; {told}", percent)
    if not evidence.canary.lately:
        return Decision("hold", "Silent", f"no answer of the canary in the last minute; {told}", percent)
    following = rules.after(percent)
    if following == 100:
        return Decision("promote", "Promoted", f"{percent}% -> all traffic; {told}", 100)
    return Decision("step", "Stepped", f"{percent}% -> {following}%; {told}", following)


def _roll_back(percent: int, kind: str, why: str) -> Decision:
    return Decision("rollback", kind, f"{percent}% -> 0%; {why}", 0)
