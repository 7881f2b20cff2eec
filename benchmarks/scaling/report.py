"""The tables of docs/scaling.md in Markdown; a test holds the page to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.scaling import model
from benchmarks.scaling.capacity import (
    BANDWIDTH_SHARE,
    CONTEXT,
    GPUS,
    REFERENCE,
    Gpu,
    Mix,
    container_concurrency,
    sequences_by_server,
    sequences_that_fit,
    service_curve,
    step_s,
    usd_per_million,
)
from benchmarks.scaling.kpa import Settings


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def concurrency(gpus: Sequence[Gpu] = GPUS, mix: Mix = REFERENCE) -> str:
    columns = (
        "GPU",
        "memory, MiB",
        f"fit, {CONTEXT:,} tokens",
        "in the server's 90%",
        f"fit, {mix.reserved + 1:,.0f} tokens",
        "`containerConcurrency`",
        "`--max-running`",
        "replica 2 from",
    )
    rows = []
    for gpu in gpus:
        chosen = container_concurrency(gpu)
        rows.append(
            (
                gpu.name,
                f"{gpu.memory_bytes / 2**20:,.0f}",
                str(sequences_that_fit(gpu, CONTEXT)),
                str(sequences_by_server(gpu, CONTEXT)),
                f"{sequences_that_fit(gpu, mix.reserved):,}",
                str(chosen),
                str(chosen) if chosen > 64 else "default (64)",
                f"{Settings().target(chosen):.1f} at once",
            )
        )
    return table(columns, rows)


def speed(gpus: Sequence[Gpu] = GPUS, mix: Mix = REFERENCE, bandwidth_share: float = BANDWIDTH_SHARE) -> str:
    columns = (
        "GPU",
        "alone, tokens/s",
        "at once",
        "step, ms",
        "tokens/s each",
        "tokens/s in all",
        f"a request of {mix.new:.0f} tokens, s: alone / full",
        "all full contexts: step, ms",
    )
    rows = []
    for gpu in gpus:
        curve, chosen = service_curve(gpu, mix, bandwidth_share), container_concurrency(gpu)
        alone_s, full_s = curve.seconds_per_token(1), curve.seconds_per_token(chosen)
        rows.append(
            (
                gpu.name,
                f"{1 / alone_s:,.0f}",
                str(chosen),
                f"{step_s(gpu, chosen, mix.mean_context, bandwidth_share) * 1e3:.1f}",
                f"{1 / full_s:,.0f}",
                f"{chosen / full_s:,.0f}",
                f"{mix.new * alone_s:.1f} / {mix.new * full_s:.1f}",
                f"{step_s(gpu, chosen, CONTEXT, bandwidth_share) * 1e3:.1f}",
            )
        )
    return table(columns, rows)


def replicas(gpu: Gpu = GPUS[0], mix: Mix = REFERENCE, most: int = 4) -> str:
    columns = ("replicas", "to requests/s", "of their capacity", "mean latency there, s", "one more would want")
    curve, chosen, settings = service_curve(gpu, mix), container_concurrency(gpu), Settings()
    rows = []
    for number in range(1, most + 1):
        rate = model.highest_rate(curve, chosen, mix.new, number, settings)
        share = rate / number / model.capacity(curve, chosen, mix.new)
        latency_s = model.latency_s(curve, chosen, mix.new, rate / number)
        wanted = model.desired_replicas(curve, chosen, mix.new, rate, number + 1, settings)
        rows.append((str(number), f"{rate:.1f}", f"{share:.0%}", f"{latency_s:.1f}", f"{wanted:.2f}"))
    return table(columns, rows)


def cost(gpus: Sequence[Gpu] = GPUS, mix: Mix = REFERENCE, bandwidth_share: float = BANDWIDTH_SHARE) -> str:
    columns = (
        "GPU",
        "USD per hour (assumed)",
        "full",
        "at the target (70%)",
        "one request at a time",
        "10% of the hour",
    )
    rows = []
    for gpu in gpus:
        curve, chosen = service_curve(gpu, mix, bandwidth_share), container_concurrency(gpu)
        full = curve.tokens_per_s(chosen)
        rates = (full, curve.tokens_per_s(Settings().target(chosen)), curve.tokens_per_s(1), full / 10)
        rows.append(
            (gpu.name, f"{gpu.usd_per_hour:.2f}", *(f"{usd_per_million(gpu.usd_per_hour, rate):.3f}" for rate in rates))
        )
    return table(columns, rows)


def changes(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """From `variants`: what one changed number does."""
    columns = ("changed", "p50, s", "p90, s", "p99, s", "503", "504", "most waiting", "replica-hours")
    rows = [
        (
            name,
            *(f"{told[key]:.1f}" for key in ("p50_s", "p90_s", "p99_s")),
            *(f"{told[key]:,.0f}" for key in ("status_503", "status_504", "most_waiting")),
            f"{told['replica_hours']:.2f}",
        )
        for name, told in summaries.items()
    ]
    return table(columns, rows)


def compared(measured: Mapping[str, Any]) -> str:
    """The server beside the simulation, from a file that `measure` wrote."""
    columns = (
        "arrivals, of the capacity",
        "requests",
        "in the system: server / simulated",
        "mean latency, s",
        "p50, s",
        "p90, s",
    )
    rows = []
    for each in measured["compared"]:
        server, simulated = each["server"], each["simulated"]
        pairs = (f"{server[key]:.2f} / {simulated[key]:.2f}" for key in ("mean_in_system", "mean_s", "p50_s", "p90_s"))
        rows.append((f"{each['share_of_capacity']:.0%}", str(server["requests"]), *pairs))
    return table(columns, rows)
