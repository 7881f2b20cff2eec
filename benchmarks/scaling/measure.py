"""The real server beside the simulation: its service curve, and the same arrivals answered by both.

Curve and arrivals are measured in turn. The simulation gets the arrival times that the server got, one replica and the
curve of the same round, so that what else the machine does burdens both alike.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from benchmarks.contestants import machine
from benchmarks.scaling.arrivals import Request
from benchmarks.scaling.fleet import Deployment
from benchmarks.scaling.service import ServiceCurve, from_points
from benchmarks.scaling.simulation import simulate
from benchmarks.serving.client import V1, open_session
from benchmarks.serving.load import Run, Served, Target, run_arrivals, run_clients
from benchmarks.serving.processes import ServerProcess, settings_of
from benchmarks.serving.workload import Ask, Lengths, Mix

MIX = Mix(Lengths.fixed, words=16, new_tokens=48)
# Of a client's answers the first and the last are left out: others were not there yet, or no more.
REQUESTS_PER_CLIENT = 5
# Clients begin so far apart that 32 of them are spread over an answer's time. Begun together they would stay together,
# and all their prompts would be computed at once, which chance does not do.
APART_S = 0.05
# A run in which other processes take more of the cores is measured again after a pause, at most so often in all.
QUIET_SHARE = 0.08
TRIES = 12
PAUSE_S = 3.0

Result = TypeVar("Result")
# The server's own limit on what runs together is 64 (--max-running): past it the curve means nothing.
CLIENTS = (1, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Observed:
    """One load, by a server or a simulation."""

    requests: int
    mean_in_system: float  # requests, over the time from the first arrival to the last answer
    mean_s: float
    p50_s: float
    p90_s: float

    @classmethod
    def of(cls, latencies_s: list[float], seconds: float) -> Observed:
        p50, p90 = (float(each) for each in np.percentile(latencies_s, (50, 90)))
        mean = statistics.fmean(latencies_s)
        return cls(len(latencies_s), sum(latencies_s) / seconds, mean, p50, p90)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The server and the simulation under the same arrivals."""

    share_of_capacity: float  # of that round's
    server: Observed
    simulated: Observed


@dataclass(frozen=True, slots=True)
class _Round:
    curve: ServiceCurve
    asked_at_s: list[float]
    run: Run


class Quiet:
    """Repeats what is measured until other processes leave it alone."""

    def __init__(self, others_s: Callable[[], float]) -> None:
        """`others_s`: processor seconds of everybody else so far."""
        self._others_s = others_s
        self.shares: list[float] = []
        self.discarded = 0

    async def run(self, measure: Callable[[], Awaitable[Result]]) -> Result:
        """The first run with at most `QUIET_SHARE`, or of `TRIES` the one that was disturbed least."""
        found: list[tuple[float, Result]] = []
        while not found or (found[-1][0] > QUIET_SHARE and len(found) < TRIES):
            if found:
                await asyncio.sleep(PAUSE_S)
            others_s, began = self._others_s(), time.perf_counter()
            result = await measure()
            share = (self._others_s() - others_s) / (time.perf_counter() - began) / machine.physical_cores()
            found.append((share, result))
        share, result = min(found, key=lambda each: each[0])
        self.shares.append(share)
        self.discarded += len(found) - 1
        return result


def compare(
    model: Path, dtype: str, threads: int, shares: tuple[float, ...], seconds: float, rounds: int
) -> tuple[ServiceCurve, list[Comparison], dict[str, Any]]:
    """Measure the curve, then in turn curve and arrivals at `shares` of its capacity; a progress bar meanwhile."""
    server = ServerProcess(settings_of(model, dtype) | {"PREDICTOR_THREADS": str(threads)})
    try:
        return asyncio.run(_compare(server, model, threads, shares, seconds, rounds))
    finally:
        server.close()


async def _compare(
    server: ServerProcess, model: Path, threads: int, shares: tuple[float, ...], seconds: float, rounds: int
) -> tuple[ServiceCurve, list[Comparison], dict[str, Any]]:
    curves: list[ServiceCurve] = []
    runs: dict[float, list[_Round]] = {share: [] for share in shares}
    where = machine.describe()
    width, kernels = server.dtype_and_kernels()
    name = f"{model.name} {width}, {threads} thread(s)"
    described = f"{where['cpu']} ({where['cpu_family_and_model']}), {where['cores']} cores, {where['date']}"
    async with open_session(server.url) as session:
        target = V1(session)
        await run_clients(target, MIX.clients(2, 2, seed=-1))  # what is made at the first request is made now
        quiet = Quiet(lambda: machine.busy_s() - server.cpu_s() - time.process_time())
        with tqdm(total=rounds * (len(CLIENTS) + len(shares)), unit=" runs") as bar:
            for number in range(rounds):
                points = []
                for clients in CLIENTS:
                    bar.set_postfix_str(f"{clients} clients")
                    rate = await quiet.run(partial(_closed_loop, target, clients, number))
                    points.append((clients, rate))
                    bar.update()
                curves.append(from_points(name, points, described))
                capacity = curves[-1].tokens_per_s(CLIENTS[-1]) / MIX.new_tokens
                for share in shares:
                    bar.set_postfix_str(f"{share:.0%} of {capacity:.1f}/s")
                    arrivals = MIX.arrivals(share * capacity, seconds, number, first_token_share=0)
                    run = await quiet.run(partial(run_arrivals, target, arrivals))
                    runs[share].append(_Round(curves[-1], [arrival.at_s for arrival in arrivals], run))
                    bar.update()
    compared = [Comparison(share, _served(found), _simulated(found)) for share, found in runs.items()]
    medians = tuple(statistics.median(each.token_s[at] for each in curves) for at in range(len(CLIENTS)))
    facts = {
        "machine": where,
        "kernels": kernels,
        "mix": MIX.describe(),
        "new_tokens": MIX.new_tokens,
        "rounds": rounds,
        "seconds_per_rate_and_round": seconds,
        "ready_s": server.ready_s,
        "capacity_per_s": [curve.tokens_per_s(CLIENTS[-1]) / MIX.new_tokens for curve in curves],
        # Of the cores, taken by other processes: the most and the mean of the runs that count, and those that do not.
        "most_others_share": max(quiet.shares),
        "mean_others_share": statistics.fmean(quiet.shares),
        "runs_discarded": quiet.discarded,
    }
    return ServiceCurve(name, curves[0].running, medians, described), compared, facts


async def _closed_loop(target: Target, clients: int, seed: int) -> float:
    """Tokens/s of so many clients that each wait for their answers: by Little's law from their mean latency."""

    async def client(number: int, asks: list[Ask]) -> list[Served]:
        await asyncio.sleep(number * APART_S)
        return (await run_clients(target, [asks])).served[1:-1]

    asked = MIX.clients(clients, REQUESTS_PER_CLIENT, seed)
    served = await asyncio.gather(*(client(number, asks) for number, asks in enumerate(asked)))
    return clients * MIX.new_tokens / statistics.fmean(each.latency_s for one in served for each in one)


def _served(rounds: list[_Round]) -> Observed:
    latencies = [served.latency_s for each in rounds for served in each.run.served]
    return Observed.of(latencies, sum(each.run.seconds for each in rounds))


def _simulated(rounds: list[_Round]) -> Observed:
    """One replica that never scales, asked when the server was asked, as fast as it was in that round."""
    deployment = Deployment(concurrency=64, min_replicas=1, max_replicas=1)
    latencies, seconds = list[float](), 0.0
    for each in rounds:
        requests = [Request(at_s, MIX.new_tokens) for at_s in each.asked_at_s]
        found = simulate(each.curve, deployment, requests, initial_replicas=1)
        latencies += [answer.latency_s for answer in found.answers]
        seconds += found.ended_s
    return Observed.of(latencies, seconds)


def as_json(curve: ServiceCurve, compared: list[Comparison], facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {"curve": asdict(curve), "compared": [asdict(each) for each in compared]}
