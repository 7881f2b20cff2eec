"""A rollout's decisions and the statistics under them: pure functions of counts."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from predictor.errors import ConfigurationError
from predictor.rollout.decide import Check, Decision, decide
from predictor.rollout.evidence import Evidence, Histogram, Seen, Shadow
from predictor.rollout.rules import RewardRule, Rules, ShadowRule, load_rules
from predictor.rollout.statistics import Share, bounds
from tests.conftest import ROOT

# ------------------------------------------------------------------------------------------------------- statistics


def test_bounds_hold_at_every_look_at_once() -> None:
    """The promise: of 200 canaries looked at after each of 300 answers, at most 5% are ever outside; some are."""
    random.seed(1)
    missed = 0
    for _ in range(200):
        bad = 0
        for n in range(1, 301):
            bad += random.random() < 0.1
            low, high = bounds(Share(bad, n), 0.05)
            if not low <= 0.1 <= high:
                missed += 1
                break
    assert 0 < missed <= 0.05 * 200


def test_bounds_of_rewards_between_zero_and_one_hold_too() -> None:
    random.seed(2)
    missed = 0
    for _ in range(150):
        total = 0.0
        for n in range(1, 301):
            total += random.betavariate(0.5, 1.5)  # mean 0.25
            low, high = bounds(Share(total, n), 0.05)
            if not low <= 0.25 <= high:
                missed += 1
                break
    assert missed <= 0.05 * 150


@pytest.mark.parametrize(("bad", "total"), [(0, 10), (10, 10), (3, 10), (1, 10_000), (2.5, 7)])
def test_the_bounds_are_where_the_likelihood_ratio_is_one_over_the_risk(bad: float, total: float) -> None:
    """Against the mixture integrated by hand: the mean of the likelihood ratio over a Beta(1/2, 1/2) prior."""
    risk = 0.05

    def ratio(p: float) -> float:
        steps = 200_000  # midpoints of the prior's quantiles: q = sin^2(pi u / 2)
        peak = bad * math.log(max(bad, 1e-300) / total) + (total - bad) * math.log(max(1 - bad / total, 1e-300))
        mean = 0.0
        for i in range(0, steps, 40):
            q = math.sin(math.pi * (i + 20) / steps / 2) ** 2
            mean += math.exp(bad * math.log(q) + (total - bad) * math.log1p(-q) - peak)
        mean *= 40 / steps
        return mean * math.exp(peak - bad * math.log(p) - (total - bad) * math.log1p(-p))

    low, high = bounds(Share(bad, total), risk)
    assert low <= bad / total <= high
    for edge in (low, high):
        if 0 < edge < 1:
            assert ratio(edge) == pytest.approx(1 / risk, rel=0.02)


@pytest.mark.parametrize("total", [0, -3, math.nan, math.inf, 1e306])
def test_what_cannot_be_counted_says_nothing(total: float) -> None:
    assert bounds(Share(0, total), 0.05) == (0, 1)


@pytest.mark.parametrize("bad", [-0.5, 10.5])
def test_rewards_outside_their_range_are_taken_for_its_ends(bad: float) -> None:
    assert bounds(Share(bad, 10), 0.05) == bounds(Share(0 if bad < 0 else 10, 10), 0.05)


def test_more_answers_narrow_the_bounds() -> None:
    widths = [high - low for low, high in (bounds(Share(0.1 * n, n), 0.05) for n in (10, 100, 1000, 10_000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.03


# -------------------------------------------------------------------------------------------------------- histograms


def histogram(**counts: float) -> Histogram:
    """Counts at most a bound in ms: `_10=5` is five at most 10 ms; `inf` closes it."""
    return Histogram({math.inf if key == "inf" else float(key[1:]) / 1000: value for key, value in counts.items()})


def test_a_quantile_is_as_prometheus_has_it() -> None:
    of_100 = histogram(_10=50, _20=90, _40=100, inf=100)
    assert of_100.quantile(0.5) == pytest.approx(0.010)
    assert of_100.quantile(0.7) == pytest.approx(0.015)
    assert of_100.quantile(0.95) == pytest.approx(0.030)
    assert histogram(_10=1, inf=2).quantile(0.95) == math.inf
    assert Histogram().quantile(0.95) == math.inf


def test_past_a_bound_is_what_is_not_at_most_it() -> None:
    counts = histogram(_10=50, _20=90, _40=98, inf=100)
    assert counts.bounds == [0.010, 0.020, 0.040]
    assert counts.past(0.020) == Share(10, 100)
    assert counts.past(0.040) == Share(2, 100)


# --------------------------------------------------------------------------------------------------------- decisions


def latencies(n: float, median_ms: float) -> Histogram:
    """n observations spread around a median: 95% within twice of it."""
    shares = {0.5: 0.05, 1: 0.5, 2: 0.96, 4: 0.999, 8: 1.0}
    bounds_ms = [2 ** (k / 2) for k in range(-4, 24)]

    def at_most(bound: float) -> float:
        return max((share for factor, share in shares.items() if bound >= factor * median_ms), default=0.0)

    return Histogram({b / 1000: round(n * at_most(b)) for b in bounds_ms} | {math.inf: n})


def version(n: float, errors: float = 0, slowdown: float = 1) -> Seen:
    ttft_s, itl_s = latencies(n - errors, 20 * slowdown), latencies(n - errors, 4 * slowdown)
    return Seen(Share(errors, n), ttft_s, itl_s, lately=n)


RULES = Rules.model_validate({})
LONG = 1e6


def decided(stable: Seen, canary: Seen, percent: int = 10, step_s: float = LONG, **rules: Any) -> Decision:
    given = Rules.model_validate(RULES.model_dump() | rules)
    return decide(percent, step_s, Evidence(stable, canary), given)


def test_a_canary_as_good_as_the_stable_version_goes_up_every_step() -> None:
    percent, path = 10, []
    while percent < 100:
        decision = decided(version(20_000, 20), version(2_000, 2), percent)
        path.append((decision.action, decision.percent))
        percent = decision.percent
    assert path == [("step", 25), ("step", 50), ("promote", 100)]


@pytest.mark.parametrize(("percent", "following"), [(1, 10), (5, 10), (10, 25), (30, 50), (60, 100), (99, 100)])
def test_a_share_between_the_steps_goes_to_the_next(percent: int, following: int) -> None:
    assert decided(version(20_000), version(2_000), percent).percent == following


def test_the_first_error_is_enough_where_the_stable_version_has_none() -> None:
    decision = decided(version(50), version(5, 1), step_s=1)
    assert (decision.action, decision.kind, decision.percent) == ("rollback", "Errors", 0)
    assert decision.message == "10% -> 0%; errors 1 of 5, stable 0 of 50"


def test_an_error_of_each_is_no_reason_yet() -> None:
    assert decided(version(900, 9), version(100, 1)).action == "hold"


def test_errors_that_are_told_to_be_tolerated_are_left_to_the_statistics() -> None:
    assert decided(version(900), version(100, 1), tolerated_errors=3).action == "hold"
    assert decided(version(900), version(100, 20), tolerated_errors=50).kind == "Worse"


def test_many_more_errors_than_the_stable_version_roll_back() -> None:
    decision = decided(version(900, 9), version(100, 20))
    assert (decision.action, decision.kind) == ("rollback", "Worse")
    assert decision.message == "10% -> 0%; errors 20.0% of 100, stable 1.0% of 900"


def test_an_outage_of_both_is_not_held_against_the_canary() -> None:
    assert decided(version(900, 300), version(100, 33)).action == "hold"


@pytest.mark.parametrize("which", ["ttft_s", "itl_s"])
def test_a_canary_three_times_slower_is_rolled_back_soon(which: str) -> None:
    stable, canary = version(180), version(20)
    slow = replace(canary, **{which: getattr(version(20, slowdown=3), which)})
    decision = decided(stable, slow, step_s=4)
    assert (decision.action, decision.kind) == ("rollback", "Worse")
    assert {"ttft_s": "time to first token", "itl_s": "time between tokens"}[which] in decision.message
    assert decided(stable, canary, step_s=4).action == "hold"


def test_a_faster_canary_is_no_worse() -> None:
    assert decided(version(20_000), version(2_000, slowdown=0.3)).action == "step"


STEADY = version(20_000)  # of which only the errors are looked at


def fate(stable_rate: float, canary_rate: float, seconds: int, **rules: Any) -> Decision | None:
    """What becomes of a canary at 10% of 50 requests/s, looked at every second; None while it is held."""
    stable = canary = 0
    for second in range(1, seconds + 1):
        stable += sum(random.random() < stable_rate for _ in range(45))
        canary += sum(random.random() < canary_rate for _ in range(5))
        seen = (replace(STEADY, errors=share) for share in (Share(stable, 45 * second), Share(canary, 5 * second)))
        decision = decided(*seen, **rules)
        if decision.action != "hold":
            return decision
    return None


def test_noise_is_never_promoted() -> None:
    """A canary with 6% errors where the stable version has 1%: whatever 80 of them look like on the way."""
    random.seed(3)
    fates = [fate(0.01, 0.06, 400) for _ in range(80)]
    assert [each for each in fates if each is not None and each.action != "rollback"] == []
    assert sum(each is not None for each in fates) > 76


def test_a_good_canary_is_hardly_ever_rolled_back_for_chance() -> None:
    random.seed(4)
    fates = [fate(0.01, 0.01, 1000, tolerated_errors=10_000) for _ in range(40)]
    assert sum(each is not None and each.action == "rollback" for each in fates) <= 2
    assert sum(each is not None and each.action == "step" for each in fates) >= 38


@pytest.mark.parametrize(("stable", "canary"), [(0, 0), (10_000, 0), (10_000, 99), (99, 10_000)])
def test_too_few_samples_hold(stable: int, canary: int) -> None:
    decision = decided(version(stable), version(canary))
    assert (decision.action, decision.kind, decision.percent) == ("hold", "TooFewSamples", 10)


def test_a_step_lasts_as_long_as_the_rules_say() -> None:
    good = version(20_000), version(2_000)
    assert decided(*good, step_s=59).kind == "StepLasts"
    assert decided(*good, step_s=60).action == "step"
    assert decided(*good, step_s=60, min_step_s=61).kind == "StepLasts"


def test_an_undecided_step_holds_for_ever_unless_told_otherwise() -> None:
    between = version(20_000, 200), version(2_000, 60)  # 1% and 3%: right at the margin
    assert decided(*between).kind == "Unclear"
    timed_out = decided(*between, step_s=601, step_timeout_s=600)
    assert (timed_out.action, timed_out.kind) == ("rollback", "Undecided")
    assert decided(*between, step_s=599, step_timeout_s=600).kind == "Unclear"
    assert decided(version(5), version(0), step_s=601, step_timeout_s=600).kind == "Undecided"


def test_answers_of_one_token_have_no_time_between_tokens_to_compare() -> None:
    stable, canary = (replace(version(n), itl_s=Histogram()) for n in (20_000, 2_000))
    assert decided(stable, canary).action == "step"


SLOWEST = histogram(_10=0, _20=0, inf=2_000)  # everything past the last bound


@pytest.mark.parametrize(
    ("stable", "canary"),
    [
        ({"ttft_s": Histogram()}, {"ttft_s": Histogram()}),  # nothing is measured at all
        ({"ttft_s": Histogram()}, {}),
        ({}, {"ttft_s": Histogram()}),
        ({"ttft_s": Histogram(), "itl_s": Histogram()}, {"ttft_s": SLOWEST}),  # an older image without histograms
        ({}, {"ttft_s": Histogram({0.123: 2_000, math.inf: 2_000})}),  # no bound in common
        ({}, {"itl_s": Histogram()}),
    ],
)
def test_what_is_not_measured_is_no_proof(stable: dict[str, Any], canary: dict[str, Any]) -> None:
    assert decided(replace(version(20_000), **stable), replace(version(2_000), **canary)).kind == "Unclear"


def test_a_stable_tail_past_the_last_bound_is_compared_at_the_last_bound() -> None:
    stable = replace(version(20_000), ttft_s=histogram(_10=10_000, _20=18_000, inf=20_000))
    assert decided(stable, replace(version(2_000), ttft_s=SLOWEST)).kind == "Worse"
    as_slow = histogram(_10=1_000, _20=1_800, inf=2_000)
    assert decided(stable, replace(version(2_000), ttft_s=as_slow)).action == "step"


def test_a_long_tail_does_not_hide_a_slow_median() -> None:
    """Of the stable version 10% take 16 times the median: three times the median is not in its tail."""
    stable = replace(version(180), itl_s=histogram(_4=90, _6=160, _12=162, _24=162, _48=162, _96=180, inf=180))
    canary = replace(version(40), itl_s=histogram(_4=0, _6=0, _12=20, _24=36, _48=36, _96=40, inf=40))
    decision = decided(stable, canary)
    assert (decision.action, decision.kind) == ("rollback", "Worse")
    assert "between tokens past" in decision.message


def test_a_canary_that_fell_silent_goes_no_further() -> None:
    decision = decided(version(20_000), replace(version(2_000), lately=0))
    assert (decision.action, decision.kind) == ("hold", "Silent")


def test_a_lower_reward_rolls_back_and_none_is_not_proof() -> None:
    def rewarded(n: int, mean: float) -> Seen:
        return replace(version(n), reward=Share((1 - mean) * n, n))

    assert decided(rewarded(20_000, 0.8), rewarded(2_000, 0.5), reward={}).kind == "Worse"
    assert decided(rewarded(20_000, 0.8), rewarded(2_000, 0.8), reward={}).action == "step"
    assert decided(version(20_000), version(2_000), reward={}).kind == "Unclear"
    assert decided(rewarded(20_000, 0.8), rewarded(2_000, 0.5)).action == "step"  # not asked for


def test_a_shadow_difference_rolls_back_at_once() -> None:
    rules = Rules.model_validate({"shadow": {"prompts": ["a", "b"]}})
    evidence = Evidence(version(0), version(0), Shadow(1, 2, "prompts[1]"))
    decision = decide(10, 0, evidence, rules)
    assert (decision.action, decision.kind) == ("rollback", "ShadowDiffers")
    assert decision.message == "10% -> 0%; 1 of 2 seeded prompts answered alike, prompts[1] differs"
    lenient = Rules.model_validate({"shadow": {"prompts": ["a", "b"], "min_agreement": 0.5}})
    assert decide(10, 0, evidence, lenient).action == "hold"


def test_decisions_are_one_line() -> None:
    for stable, canary in [(0, 0), (900, 100), (20_000, 2_000)]:
        for errors in (0, 1, 50):
            message = decided(version(stable), version(canary, min(errors, canary))).message
            assert "\n" not in message
            assert len(message) < 400


def test_a_check_is_never_both_worse_and_as_good() -> None:
    for canary in range(0, 101, 5):
        for stable in range(0, 1001, 50):
            check = Check("errors", Share(canary, 100), Share(stable, 1000), 0.02)
            worse = check.verdict(0.05, 0.05) == "worse"
            assert not worse or canary / 100 > stable / 1000 + 0.02


# ------------------------------------------------------------------------------------------------------------- rules


def test_rules_have_defaults_and_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("steps: [5, 50, 100]\nmax_itl_ratio: 2\nshadow:\n  prompts: [To be]\n")
    rules = load_rules(path)
    assert rules.steps == (5, 50, 100)
    assert rules.max_itl_ratio == 2
    assert rules.shadow is not None
    assert rules.shadow.min_agreement == 1
    assert load_rules(None) == RULES
    path.write_text("")
    assert load_rules(path) == RULES


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("step: [10, 100]", "step: "),
        ("steps: [50, 10, 100]", "steps: "),
        ("steps: [10, 50]", "steps: "),
        ("steps: [100]", "steps: "),
        ("min_samples: many", "min_samples: "),
        ("max_error_increase: 2", "max_error_increase: "),
        ("promote_risk: 0", "promote_risk: "),
        ("shadow: {}", "shadow.prompts: "),
        ("shadow: {prompts: []}", "shadow.prompts: "),
        ("reward: {metric: 'a b'}", "reward.metric: "),
        ("max_ttft_ratio: 1", "max_ttft_ratio: "),
        ("- 10", "the file: "),
        ("steps: [true, 100]", "steps.0: "),
        ("min_step_s: .inf", "min_step_s: "),
        ("max_ttft_ratio: .inf", "max_ttft_ratio: "),
        ("error_codes: '('", "error_codes: "),
        ("a: [", "cannot be read"),
        ("ready_timeout_s: 2024-13-45", "cannot be read"),
        ("[" * 3000, "cannot be read"),
    ],
)
def test_wrong_rules_name_the_field(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="--rules") as caught:
        load_rules(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_rules_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"rules\.yaml cannot be read"):
        load_rules(tmp_path / "rules.yaml")


def test_the_guide_has_every_rule_with_its_default() -> None:
    def rows(prefix: str, model: type[BaseModel]) -> list[str]:
        return [
            f"| `{prefix}{name}` | {_default(field)} | {field.description} |"
            for name, field in model.model_fields.items()
            if name not in ("reward", "shadow")
        ]

    guide = (ROOT / "docs" / "rollout.md").read_text()
    wanted = rows("", Rules) + rows("reward.", RewardRule) + rows("shadow.", ShadowRule)
    assert [line for line in guide.splitlines() if line in wanted] == wanted


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(list(field.default) if isinstance(field.default, tuple) else field.default)}`"


def test_the_answers_that_the_guide_promises() -> None:
    risk = RULES.promote_risk / (3 * 3)  # three comparisons, three steps
    nothing_bad = Share(0, 10**9)
    for margin, answers in [(0.02, 473), (0.05, 177)]:
        assert Check("", Share(0, answers), nothing_bad, margin).verdict(risk, 0.05) == "as good"
        assert Check("", Share(0, answers - 1), nothing_bad, margin).verdict(risk, 0.05) == "unclear"
    stable = Share(0, 9 * 16)
    assert Check("", Share(8, 16), stable, 0.1).verdict(risk, 0.05) == "worse"
    assert Check("", Share(7, 14), Share(0, 9 * 14), 0.1).verdict(risk, 0.05) == "unclear"
