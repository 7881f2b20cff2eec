"""What is simulated for docs/scaling.md: two systems, three loads, and what each number of the manifest changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.scaling.arrivals import Load, burst, draw, ramp
from benchmarks.scaling.capacity import GPUS, REFERENCE, container_concurrency, service_curve
from benchmarks.scaling.fleet import ColdStart, Deployment
from benchmarks.scaling.kpa import Settings
from benchmarks.scaling.model import capacity
from benchmarks.scaling.service import ServiceCurve
from benchmarks.scaling.simulation import Outcome, simulate

# A request's length over the mean, each as likely: some are short, few are long.
LENGTHS = (0.25, 0.5, 1.0, 2.25)


@dataclass(frozen=True, slots=True)
class System:
    name: str
    curve: ServiceCurve
    deployment: Deployment
    tokens: float  # new ones, of the mean request
    pace_s: float  # what the loads' times are multiples of

    @property
    def capacity(self) -> float:
        """Requests/s of a full replica."""
        return capacity(self.curve, self.deployment.concurrency, self.tokens)


def on_cpu(curve: ServiceCurve, tokens: float, load_s: float) -> System:
    """Measured service and load; assumed: the node is there, 1.8 GB of image at 60 MB/s."""
    deployment = Deployment(32, 1, 4, ColdStart(node_s=0, pull_s=30, load_s=load_s))
    return System("124M int8 on CPU: measured service", curve, deployment, tokens, pace_s=60)


def on_v100() -> System:
    """Computed service; assumed: a node in 240 s, 6 GB of image at 100 MB/s, 6.4 GB of weights at 200 MB/s and 28 s
    for CUDA, graphs, warm-up and the probe."""
    gpu = GPUS[0]
    cold_start = ColdStart(node_s=240, pull_s=60, load_s=60)
    deployment = Deployment(container_concurrency(gpu), 1, 4, cold_start)
    name = f"1.5B FP16 on {gpu.name}: computed, never measured"
    return System(name, service_curve(gpu, REFERENCE), deployment, REFERENCE.new, pace_s=240)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    system: System
    load: Load
    initial_replicas: int = 1

    def run(self, seed: int) -> Outcome:
        requests = draw(self.load, self.system.tokens, seed, LENGTHS)
        return simulate(
            self.system.curve,
            self.system.deployment,
            requests,
            initial_replicas=self.initial_replicas,
            until_s=self.load.ends_s,
        )


def scenarios(system: System) -> list[Scenario]:
    """A burst, a ramp and a scale from zero and back; rates are multiples of one replica's capacity."""
    one, pace = system.capacity, system.pace_s
    never_idle = Scenario("burst", system, burst(0.3 * one, 2.5 * one, pace, 6 * pace, 14 * pace))
    rising = Scenario("ramp", system, ramp(0.3 * one, 3 * one, pace, 6 * pace, 2 * pace, 18 * pace))
    # The component scale-to-zero: Knative's longest timeout.
    asleep = replace(system, deployment=replace(system.deployment, min_replicas=0, timeout_s=600.0))
    woken = Scenario("zero", asleep, burst(0, 0.8 * one, pace, 4 * pace, 10 * pace), initial_replicas=0)
    return [never_idle, rising, woken]


def delayed(system: System) -> list[Scenario]:
    """The ramp without a scale-down delay, and with one of 15 minutes."""
    rising = scenarios(system)[1]
    settings = replace(system.deployment.autoscaler, scale_down_delay_s=900)
    patient = replace(
        system,
        name=f"{system.name}, scale-down-delay: 15m",
        deployment=replace(system.deployment, autoscaler=settings),
    )
    return [replace(rising, name="delay"), replace(rising, name="delay", system=patient)]


def variants(system: System) -> list[tuple[str, Scenario]]:
    """Two bursts, with one number changed at a time; all but the second without a scale-down delay."""
    one, pace = system.capacity, system.pace_s
    low, high = 0.3 * one, 2.5 * one
    first, second = 1.0, 7.0
    points = [(0.0, low)]
    for begins in (first, second):
        points += [(begins * pace, low), (begins * pace, high), ((begins + 3) * pace, high), ((begins + 3) * pace, low)]
    load = Load("two bursts", (*points, (16 * pace, low)))
    deployment = system.deployment

    def with_settings(**changed: Any) -> Deployment:
        return replace(deployment, autoscaler=replace(Settings(), **changed))

    changed = {
        "Knative's default of no scale-down delay": deployment,
        "15 minutes of it, as in `manifests/base`": with_settings(scale_down_delay_s=900),
        "`minReplicas: 2`": replace(deployment, min_replicas=2),
        "`maxReplicas: 8`": replace(deployment, max_replicas=8),
        "`target-utilization-percentage: 40`": with_settings(target_utilization=0.4),
        "`target-burst-capacity: 0`": with_settings(target_burst_capacity=0),
        "`containerConcurrency: 8`": replace(deployment, concurrency=8),
        "nodes and images kept ready": replace(
            deployment, cold_start=replace(deployment.cold_start, node_s=0, pull_s=0)
        ),
    }
    return [
        (name, Scenario(name, replace(system, deployment=each), load, max(1, each.min_replicas)))
        for name, each in changed.items()
    ]


def summarise(outcome: Outcome) -> dict[str, float]:
    latencies = [answer.latency_s for answer in outcome.with_status(200)]
    p50, p90, p99 = (float(each) for each in np.percentile(latencies, (50, 90, 99)))
    return {
        "requests": len(outcome.answers),
        "p50_s": p50,
        "p90_s": p90,
        "p99_s": p99,
        "status_503": len(outcome.with_status(503)),
        "status_504": len(outcome.with_status(504)),
        "most_ready": max(moment.ready for moment in outcome.moments),
        "most_waiting": max(moment.waiting for moment in outcome.moments),
        "mean_in_system": outcome.mean_in_system,
        "replica_hours": outcome.replica_s / 3600,
    }
