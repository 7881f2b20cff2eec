"""benchmarks/scaling: the autoscaler's rules by hand, the capacity's arithmetic, the simulation against paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import make_checkpoint
from benchmarks.scaling import capacity, kpa, measure, model, report, scenarios
from benchmarks.scaling.__main__ import RESULTS, cli
from benchmarks.scaling.arrivals import Request, burst, draw, ramp, steady
from benchmarks.scaling.fleet import ColdStart, Deployment
from benchmarks.scaling.plot import plot
from benchmarks.scaling.replica import Answer
from benchmarks.scaling.service import ServiceCurve, from_points
from benchmarks.scaling.simulation import Outcome, simulate
from predictor.model.config import parse_config
from predictor.model.cuda.graphs import bucket_sizes

ROOT = Path(__file__).resolve().parents[1]
GPUS = {gpu.name: gpu for gpu in capacity.GPUS}
# A step takes 4 ms and 0.5 ms per sequence.
CURVE = ServiceCurve("a line", (1, 32), (0.0045, 0.020), None)
TOKENS = 40.0
ONE = model.capacity(CURVE, 32, TOKENS)  # 40 requests/s: 32 of them in 40 * 20 ms


def autoscaler(concurrency: int = 32, least: int = 0, most: int = 0, **settings: float) -> kpa.Autoscaler:
    return kpa.Autoscaler(replace(kpa.Settings(), **settings), concurrency, least, most)  # type: ignore[arg-type]


# The autoscaler, by hand


@pytest.mark.parametrize(
    ("concurrency", "in_system", "replicas"),
    [
        (10, 50, 8),  # 50 / 7 = 7.1
        (10, 100, 15),  # 100 / 7 = 14.3: the example of Knative's documentation
        (32, 22.4, 1),  # exactly 70%
        (32, 22.5, 2),
        (32, 128, 6),  # 4 full replicas want to be 5.7
        (1, 3, 3),  # a target is never below 1
        (32, 0, 0),
    ],
)
def test_replicas_are_the_concurrency_over_the_target_rounded_up(
    concurrency: int, in_system: float, replicas: int
) -> None:
    ready = max(1, replicas)  # as many as wanted: neither panic nor a rate's limit
    assert autoscaler(concurrency).desired(0, ready, in_system, in_system) == replicas


def test_panic_begins_when_six_seconds_want_twice_the_ready_replicas() -> None:
    calm = autoscaler()
    assert calm.desired(0, ready=2, stable=10, panic=67.1) == 1  # 3 is less than twice 2
    assert calm.panicking_since is None
    assert calm.desired(2, ready=2, stable=10, panic=67.3) == 4
    assert calm.panicking_since == 2


def test_one_replica_panics_as_soon_as_it_wants_a_second() -> None:
    alone = autoscaler()
    assert alone.desired(0, ready=1, stable=5, panic=22.5) == 2
    assert alone.panicking_since == 0


def test_panic_never_scales_down_and_ends_a_stable_window_after_its_last_reason() -> None:
    scaler = autoscaler()
    assert scaler.desired(0, ready=1, stable=10, panic=100) == 5  # 100 / 22.4 = 4.5
    assert scaler.desired(10, ready=1, stable=10, panic=50) == 5  # 3 wanted, still twice 1: the window begins anew
    assert scaler.desired(70, ready=5, stable=10, panic=10) == 5  # 60 s later, not past it
    assert scaler.desired(72, ready=5, stable=10, panic=10) == 2  # 1 wanted, and at most down to a half


def test_a_step_up_is_limited_by_its_rate_and_grows_by_one_at_least() -> None:
    slow = autoscaler(1, max_scale_up_rate=1.1)
    assert slow.desired(0, ready=2, stable=3, panic=3) == 3  # ceil(1.1 * 2)
    assert slow.desired(0, ready=2, stable=10, panic=3) == 3


def test_a_step_down_halves_at_most() -> None:
    assert autoscaler().desired(0, ready=8, stable=1, panic=1) == 4
    assert autoscaler().desired(0, ready=1, stable=0, panic=0) == 0


def test_the_scale_down_delay_keeps_the_most_that_was_wanted_within_it() -> None:
    scaler = autoscaler(scale_down_delay_s=60)
    assert scaler.desired(0, ready=3, stable=60, panic=60) == 3
    assert scaler.desired(58, ready=3, stable=1, panic=1) == 3
    assert scaler.desired(60, ready=3, stable=1, panic=1) == 1
    assert scaler.desired(62, ready=1, stable=40, panic=10) == 2  # up at once


def test_bounds_hold_whatever_is_wanted() -> None:
    assert autoscaler(least=2, most=4).desired(0, ready=2, stable=0, panic=0) == 2
    assert autoscaler(least=2, most=4).desired(0, ready=2, stable=500, panic=500) == 4


@pytest.mark.parametrize(
    ("ready", "panic", "capacity_left"),
    [(4, 0, -72), (7, 10, 14), (7, 25, -1), (0, 0, -200)],  # ready * 32 - 200 - panic
)
def test_the_activator_leaves_the_path_when_the_burst_has_room(ready: int, panic: float, capacity_left: float) -> None:
    assert autoscaler().excess_burst_capacity(ready, panic) == capacity_left
    assert autoscaler(target_burst_capacity=0).excess_burst_capacity(ready, panic) == 0
    assert autoscaler(target_burst_capacity=-1).excess_burst_capacity(ready, panic) == -1


def test_a_window_averages_what_it_has_seen_and_counts_gaps_as_zero() -> None:
    window = kpa.Window(6)
    assert window.average(0) is None
    for second in (0, 1, 2):
        window.record(second, 30)
    assert window.average(2) == 30  # three seconds old, not six
    window.record(5, 30)
    assert window.average(5) == 20  # two of six are missing
    assert window.average(7) == pytest.approx(60 / 4)  # of seconds 2 to 7 those up to the newest value: 2 and 5
    assert window.average(11) is None
    window.record(20, 12)
    assert window.average(20) == 12  # after a window without any it begins anew


# What fits, and how fast it is


def test_the_model_is_the_one_that_is_served() -> None:
    config = parse_config(make_checkpoint.config("gpt2-xl", "float16"))
    assert config.kv_bytes_per_token(2) == capacity.KV_BYTES_PER_TOKEN
    positions = config.context * config.width
    assert (config.parameters - positions) * 2 == pytest.approx(capacity.WEIGHTS_BYTES, rel=1e-3)
    assert tuple(bucket_sizes(512)) == capacity.GRAPH_ROWS


@pytest.mark.parametrize(("name", "sequences"), [("V100-16", 39), ("V100-32", 93), ("H200-141", 464)])
def test_as_many_full_contexts_fit_as_the_project_reckons_with(name: str, sequences: int) -> None:
    assert capacity.sequences_that_fit(GPUS[name], capacity.CONTEXT) == sequences


@pytest.mark.parametrize(
    ("name", "context", "tokens_per_s"),
    [("V100-16", 0, 289), ("V100-16", 512, 275), ("V100-16", 1024, 263), ("A100-80", 512, 624), ("H200-141", 0, 1382)],
)
def test_with_all_of_the_bandwidth_a_step_takes_the_physical_limit(
    name: str, context: int, tokens_per_s: float
) -> None:
    assert 1 / capacity.step_s(GPUS[name], 1, context, bandwidth_share=1) == pytest.approx(tokens_per_s, rel=2e-3)


def test_the_assumed_share_is_what_the_targets_ask_for() -> None:
    v100 = 32 / capacity.step_s(GPUS["V100-16"], 32, 300, bandwidth_share=1) / 3_000
    h200 = 256 / capacity.step_s(GPUS["H200-141"], 256, 300, bandwidth_share=1) / 25_000
    assert 1 / v100 == pytest.approx(0.63, abs=0.005)
    assert 1 / h200 == pytest.approx(0.61, abs=0.005)
    assert min(1 / v100, 1 / h200) >= capacity.BANDWIDTH_SHARE


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("base/inferenceservice.yaml", "V100-16"),
        ("components/v100-32gb/inferenceservice.patch.yaml", "V100-32"),
        ("components/t4/inferenceservice.patch.yaml", "T4-16"),
        ("components/l4/inferenceservice.patch.yaml", "L4-24"),
        ("components/a100/inferenceservice.patch.yaml", "A100-40"),
        ("components/a100-80gb/inferenceservice.patch.yaml", "A100-80"),
        ("components/h100/inferenceservice.patch.yaml", "H100-80"),
        ("components/h200/inferenceservice.patch.yaml", "H200-141"),
    ],
)
def test_the_manifest_of_a_gpu_has_the_concurrency_of_the_formula(file: str, name: str) -> None:
    predictor = yaml.safe_load((ROOT / "manifests" / file).read_text())["spec"]["predictor"]
    assert predictor["containerConcurrency"] == capacity.container_concurrency(GPUS[name])


def test_a_replica_costs_its_price_over_its_tokens() -> None:
    assert capacity.usd_per_million(3.6, 1000) == 1.0  # 0.001 USD/s for 1,000 tokens/s


def test_a_curve_is_straight_between_its_points_and_past_the_last() -> None:
    curve = from_points("measured", [(32, 1600), (1, 200), (8, 800)], "here")
    assert curve.token_s == (0.005, 0.01, 0.02)
    assert curve.seconds_per_token(20) == pytest.approx(0.015)
    assert curve.seconds_per_token(56) == pytest.approx(0.03)
    assert curve.tokens_per_s(8) == 800


# The simulation against paper


def served(
    requests: list[Request], deployment: Deployment | None = None, initial: int = 1, until_s: float = 0
) -> Outcome:
    return simulate(CURVE, deployment or Deployment(32, 1, 1), requests, initial_replicas=initial, until_s=until_s)


def test_requests_that_overlap_share_the_engine_and_end_when_paper_says() -> None:
    # Alone 4.5 ms a token, two together 5 ms each. The second comes when the first has 10 of its 20 tokens.
    outcome = served([Request(0, 20), Request(0.045, 20)])
    first, second = (answer.ended_s for answer in outcome.answers)
    assert first == pytest.approx(0.045 + 10 * 0.005)
    assert second == pytest.approx(first + 10 * 0.0045)
    assert outcome.mean_in_system == pytest.approx((first + second - 0.045) / second)


def test_past_the_concurrency_requests_wait_in_order() -> None:
    outcome = served([Request(0.001 * n, TOKENS) for n in range(4)], Deployment(1, 1, 1))
    took = [answer.ended_s for answer in outcome.answers]
    assert took == pytest.approx([0.18, 0.36, 0.54, 0.72])


@pytest.mark.parametrize("lengths", [(1.0,), scenarios.LENGTHS])
@pytest.mark.parametrize(("share", "tolerance"), [(0.3, 0.03), (0.8, 0.06)])
def test_the_mean_number_in_the_system_is_that_of_the_queue_on_paper(
    share: float, tolerance: float, lengths: tuple[float, ...]
) -> None:
    outcome = served(draw(steady(share * ONE, 300), TOKENS, seed=1, lengths=lengths))
    paper = model.mean_in_replica(CURVE, 32, TOKENS, share * ONE)
    assert outcome.mean_in_system == pytest.approx(paper, rel=tolerance)
    latencies = sum(answer.latency_s for answer in outcome.answers)
    assert latencies / outcome.ended_s == pytest.approx(outcome.mean_in_system)  # Little's law, exactly


BURSTING = Deployment(32, 1, 4, ColdStart(30, 10, 10))


@pytest.mark.parametrize("times", [2.0, 3.0])
def test_a_burst_queues_and_drains_as_on_paper(times: float) -> None:
    rate = times * ONE
    outcome = served(draw(burst(0.3 * ONE, rate, 30, 150, 200), TOKENS, 2), BURSTING, until_s=200)
    ready = next(moment for moment in outcome.moments if moment.ready > 1)
    until_ready_s = ready.at_s - 30
    assert 50 <= until_ready_s <= 60  # the cold start, and the seconds in which the autoscaler notices
    queue = max(moment.waiting for moment in outcome.moments)
    assert queue == pytest.approx(model.queue_when_ready(rate, ONE, until_ready_s), rel=0.12)
    longest_s = max(answer.latency_s for answer in outcome.answers)
    own_s = TOKENS * CURVE.seconds_per_token(32)
    assert longest_s == pytest.approx(model.longest_wait_s(rate, ONE, until_ready_s) + own_s, rel=0.06)
    drained = next(moment for moment in outcome.moments if moment.at_s > ready.at_s and not moment.waiting)
    expected_s = model.drain_s(queue, rate, max(moment.ready for moment in outcome.moments) * ONE)
    assert drained.at_s - ready.at_s == pytest.approx(expected_s, rel=0.1, abs=2)


@pytest.mark.parametrize(("times", "lost"), [(0.9, False), (1.2, True)])
def test_a_burst_is_lost_to_the_timeout_past_the_rate_on_paper(times: float, lost: bool) -> None:
    deployment = replace(BURSTING, timeout_s=25)
    rate = times * model.largest_burst(ONE, BURSTING.cold_start.total_s + 4, 25)  # noticed after 4 s
    outcome = served(draw(burst(0.3 * ONE, rate, 20, 80, 120), TOKENS, 3), deployment, until_s=120)
    assert bool(outcome.with_status(504)) == lost
    assert len(outcome.answers) == len(outcome.with_status(200)) + len(outcome.with_status(504))
    assert model.largest_burst(ONE, 40, 40) == float("inf")


def test_queue_proxies_refuse_from_when_paper_says_and_hold_eleven_times_the_concurrency() -> None:
    settings = kpa.Settings(target_burst_capacity=0)
    deployment = replace(BURSTING, autoscaler=settings)
    rate = 2 * ONE
    outcome = served(draw(burst(0.3 * ONE, rate, 20, 60, 80), TOKENS, 4), deployment, until_s=80)
    refused = outcome.with_status(503)
    assert refused[0].ended_s - 20 == pytest.approx(model.refusals_begin_s(rate, ONE, 32, 1), rel=0.1)
    assert max(moment.waiting + moment.running for moment in outcome.moments) == 11 * 32
    assert not served(draw(burst(0.3 * ONE, rate, 20, 60, 80), TOKENS, 4), BURSTING).with_status(503)  # the activator


ASLEEP = Deployment(32, 0, 4, ColdStart(0, 20, 10))


def test_from_zero_the_first_answer_takes_the_cold_start_and_its_own_time() -> None:
    outcome = served([Request(5, TOKENS)], ASLEEP, initial=0)
    assert outcome.answers[0].latency_s == pytest.approx(model.first_answer_s(CURVE, TOKENS, 30))


@pytest.mark.parametrize(
    ("settings", "stays_s"),
    [
        (kpa.Settings(), 60),  # the stable window; the activator is in the path already
        (kpa.Settings(target_burst_capacity=0), 90),  # and the grace
        (kpa.Settings(scale_to_zero_pod_retention_s=120), 180),
    ],
)
def test_the_last_replica_stays_for_window_and_grace_or_retention(settings: kpa.Settings, stays_s: float) -> None:
    outcome = served([Request(5, TOKENS)], replace(ASLEEP, autoscaler=settings), initial=0, until_s=300)
    gone = next(moment for moment in outcome.moments if moment.at_s > 40 and not moment.ready)
    assert gone.at_s == pytest.approx(35 + stays_s, abs=2 * kpa.TICK_S)
    assert outcome.moments[-1].desired == 0


def test_a_start_from_zero_that_outlasts_the_timeout_loses_the_request_and_is_not_given_up() -> None:
    deployment = replace(ASLEEP, timeout_s=20)
    outcome = served([Request(5, TOKENS)], deployment, initial=0, until_s=60)
    assert [(answer.status, answer.latency_s) for answer in outcome.answers] == [(504, pytest.approx(20, abs=1))]
    assert outcome.moments[40].ready == 1


@pytest.mark.parametrize("times", [0.5, 1.5, 3.0])
def test_replicas_settle_where_paper_says_when_the_delay_keeps_them_from_swinging(times: float) -> None:
    settings = kpa.Settings(scale_down_delay_s=300)
    wanted = model.steady_replicas(CURVE, 32, TOKENS, times * ONE, settings)
    deployment = Deployment(32, 1, 20, autoscaler=settings)
    outcome = served(draw(steady(times * ONE, 120), TOKENS, 5), deployment, initial=wanted, until_s=120)
    assert {moment.ready for moment in outcome.moments[20:]} <= {
        wanted,
        wanted + 1,
    }  # the delay keeps a crest of chance


def test_the_rate_past_which_a_replica_is_added_is_found() -> None:
    settings = kpa.Settings()
    rate = model.highest_rate(CURVE, 32, TOKENS, 2, settings)
    assert model.desired_replicas(CURVE, 32, TOKENS, rate, 2, settings) == pytest.approx(2, rel=1e-3)
    assert model.steady_replicas(CURVE, 32, TOKENS, 0.99 * rate, settings) == 2
    assert model.steady_replicas(CURVE, 32, TOKENS, 1.01 * rate, settings) == 3


def test_without_a_delay_batching_makes_the_number_of_replicas_swing() -> None:
    settings = kpa.Settings()
    assert model.steady_replicas(CURVE, 32, TOKENS, 3 * ONE, settings) == 4
    assert (
        model.desired_replicas(CURVE, 32, TOKENS, 3 * ONE, 4, settings) < 3
    )  # four are so fast that three seem enough
    outcome = served(draw(steady(3 * ONE, 200), TOKENS, 6), Deployment(32, 1, 20), initial=4, until_s=200)
    assert {3, 4} < {moment.ready for moment in outcome.moments}


def test_a_ramp_is_served_whole_and_replicas_that_leave_finish_what_they_have() -> None:
    deployment = Deployment(32, 1, 4, ColdStart(0, 10, 10))
    load = ramp(0.2 * ONE, 2.5 * ONE, 20, 80, 20, 300)
    requests = draw(load, TOKENS, 7, scenarios.LENGTHS)
    outcome = served(requests, deployment, until_s=300)
    assert sorted(answer.request.at_s for answer in outcome.with_status(200)) == [each.at_s for each in requests]
    assert max(moment.ready for moment in outcome.moments) > 1
    assert outcome.moments[-1].ready == 1
    paid = sum(max(moment.ready, moment.desired) for moment in outcome.moments)
    assert outcome.replica_s == pytest.approx(paid, rel=0.02)


def test_the_same_seed_gives_the_same_outcome() -> None:
    load = burst(10, 100, 5, 10, 20)
    assert draw(load, TOKENS, 1) == draw(load, TOKENS, 1) != draw(load, TOKENS, 2)
    assert served(draw(load, TOKENS, 1), BURSTING) == served(draw(load, TOKENS, 1), BURSTING)


# The page, the command line, the measurement


def test_the_page_has_the_tables_that_the_code_and_the_results_give() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    told = json.loads((RESULTS / "scaling.json").read_text())
    measured = json.loads((RESULTS / "scaling-server.json").read_text())
    tables = (
        report.concurrency(),
        report.speed(),
        report.replicas(),
        report.cost(),
        report.changes(told["variants"]),
        report.compared(measured),
    )
    for table in tables:
        assert table in page, f"docs/scaling.md lacks this table, which `python -m benchmarks.scaling` gives:\n{table}"


def test_the_results_are_what_the_simulation_gives_now() -> None:
    told = json.loads((RESULTS / "scaling.json").read_text())
    name, scenario = scenarios.variants(scenarios.on_v100())[-1]
    found = scenarios.summarise(scenario.run(told["seed"]))
    assert found == pytest.approx(told["variants"][name], rel=1e-4)


def test_a_price_given_is_the_price_reckoned_with_and_an_unknown_gpu_is_named() -> None:
    runner = CliRunner()
    assert "| V100-16 | 7.50 |" in runner.invoke(cli, ["tables", "--price", "V100-16=7.5"]).output
    refused = runner.invoke(cli, ["tables", "--price", "V200=1"])
    assert refused.exit_code == 2
    assert "V200=1" in refused.output


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    system = scenarios.on_cpu(CURVE, TOKENS, load_s=1)
    system = replace(system, deployment=replace(system.deployment, timeout_s=5), pace_s=3)
    scenario = scenarios.scenarios(system)[0]
    outcome = scenario.run(seed=0)
    plot([(scenario, outcome)], tmp_path / "burst.png")
    assert (tmp_path / "burst.png").stat().st_size > 10_000


def test_the_measurement_observes_by_littles_law() -> None:
    answers = [Answer(Request(at_s, 1), 200, at_s + 2) for at_s in (0, 1, 2)]
    observed = measure.Observed.of([answer.latency_s for answer in answers], seconds=4)
    assert (observed.requests, observed.mean_in_system, observed.mean_s) == (3, 1.5, 2)


async def test_a_run_that_others_disturb_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE_S", 0)
    busy_s = iter([0.0, 5.0, 5.0, 6.0, 6.0, 6.0])  # before and after each run
    runs = iter([1, 2, 3, 4])

    async def run() -> int:
        return next(runs)

    quiet = measure.Quiet(lambda: next(busy_s))
    assert await quiet.run(run) == 3  # nobody else computed
    assert (quiet.shares, quiet.discarded) == ([0.0], 2)


async def test_where_others_never_stop_the_least_disturbed_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE_S", 0)
    monkeypatch.setattr(measure, "TRIES", 3)
    busy_s = iter([0.0, 90.0, 90.0, 100.0, 100.0, 190.0])
    runs = iter([1, 2, 3])

    async def run() -> int:
        return next(runs)

    assert await measure.Quiet(lambda: next(busy_s)).run(run) == 2
