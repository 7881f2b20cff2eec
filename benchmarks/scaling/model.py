"""The same system on paper: what the simulation is checked against, and what to reckon with by hand.

Rates are requests/s, `tokens` new tokens of the mean request, `capacity` what one replica serves with all its places
taken, in requests/s.
"""

from __future__ import annotations

from benchmarks.scaling.kpa import Settings
from benchmarks.scaling.replica import QUEUE_PROXY_DEPTH
from benchmarks.scaling.service import ServiceCurve

# Where the sum of probabilities is cut: what is left is smaller than this.
_NEGLIGIBLE = 1e-12


def capacity(curve: ServiceCurve, concurrency: int, tokens: float) -> float:
    """Requests/s of a replica that always runs `concurrency` of them."""
    return curve.tokens_per_s(concurrency) / tokens


def mean_in_replica(curve: ServiceCurve, concurrency: int, tokens: float, rate: float) -> float:
    """Mean number of requests, waiting ones included, in one replica with Poisson arrivals; infinite when overloaded.

    A shared engine is a processor-sharing queue whose speed depends on how many it serves. Of such a queue the
    distribution is p(n) ~ product of rate / (requests/s at i) for i = 1..n, whatever the distribution of lengths is
    (Cohen 1979, insensitivity of generalised processor sharing). Past `concurrency` requests wait in order, for which
    it is exact with exponential lengths only.
    """
    if rate >= capacity(curve, concurrency, tokens):
        return float("inf")
    weight, total, moment, n = 1.0, 1.0, 0.0, 0
    while n < concurrency or weight > _NEGLIGIBLE * total:
        n += 1
        weight *= rate * tokens / curve.tokens_per_s(min(n, concurrency))
        total += weight
        moment += n * weight
    return moment / total


def latency_s(curve: ServiceCurve, concurrency: int, tokens: float, rate: float) -> float:
    """Mean, by Little's law."""
    return mean_in_replica(curve, concurrency, tokens, rate) / rate


def desired_replicas(
    curve: ServiceCurve, concurrency: int, tokens: float, rate: float, replicas: int, settings: Settings
) -> float:
    """What the autoscaler wants, not rounded, while `replicas` share `rate` evenly."""
    return replicas * mean_in_replica(curve, concurrency, tokens, rate / replicas) / (settings.target(concurrency))


def steady_replicas(curve: ServiceCurve, concurrency: int, tokens: float, rate: float, settings: Settings) -> int:
    """The smallest number of replicas that the autoscaler does not add to.

    One more replica makes every request faster, so with it fewer are in the system: where a larger number wants to
    be smaller and the smaller one larger, it swings between the two, and the scale-down delay decides.
    """
    replicas = 1
    while desired_replicas(curve, concurrency, tokens, rate, replicas, settings) > replicas:
        replicas += 1
    return replicas


def highest_rate(curve: ServiceCurve, concurrency: int, tokens: float, replicas: int, settings: Settings) -> float:
    """Requests/s up to which the autoscaler adds nothing to `replicas`, to one part in a million."""
    low, high = 0.0, replicas * capacity(curve, concurrency, tokens)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if desired_replicas(curve, concurrency, tokens, middle, replicas, settings) <= replicas:
            low = middle
        else:
            high = middle
    return low


def queue_when_ready(rate: float, capacity_now: float, until_ready_s: float) -> float:
    """Requests that wait when the replicas that a burst ordered are ready."""
    return max(0.0, rate - capacity_now) * until_ready_s


def longest_wait_s(rate: float, capacity_now: float, until_ready_s: float) -> float:
    """Of a burst that the replicas to come can serve: of the request whose turn comes as they are ready.

    It came at t with capacity_now * until_ready_s = rate * t, for in order of arrival that many were served before.
    """
    return until_ready_s * max(0.0, 1 - capacity_now / rate)


def drain_s(waiting: float, rate: float, capacity_then: float) -> float:
    """Until the queue is gone, from when the new replicas are ready; infinite where they are too few."""
    return waiting / (capacity_then - rate) if capacity_then > rate else float("inf")


def largest_burst(capacity_now: float, until_ready_s: float, timeout_s: float) -> float:
    """The rate past which a burst that lasts gets 504s before the new replicas are ready; infinite where none does."""
    if timeout_s >= until_ready_s:
        return float("inf")
    return capacity_now / (1 - timeout_s / until_ready_s)


def refusals_begin_s(rate: float, capacity_now: float, concurrency: int, replicas: int) -> float:
    """From the begin of a burst into idle replicas until they and their queue-proxies are full and 503 is answered.

    Only where the activator is not in the path.
    """
    room = (QUEUE_PROXY_DEPTH + 1) * concurrency * replicas
    return room / (rate - capacity_now) if rate > capacity_now else float("inf")


def first_answer_s(curve: ServiceCurve, tokens: float, cold_start_s: float) -> float:
    """From zero replicas: the first request orders one at once, waits for it and is alone in it."""
    return cold_start_s + tokens * curve.seconds_per_token(1)
