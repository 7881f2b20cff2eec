"""Measure the server over HTTP, and in the same run the engine without it, asked the same: what does serving cost?

    python benchmarks/make_checkpoint.py --size gpt2 --out /path/to/gpt2
    python -m benchmarks.server --model /path/to/gpt2 --json benchmarks/results/server-gpt2.json --plot server.png

Three are asked in turn (A B C A B C), by so many clients that each wait for their answers: the server; the engine
behind its thread and token streams, each token handed over as it comes (the server takes those of a whole answer in
lots, so it may be the faster); and the engine alone, stepped in a loop. The last two live in one process of their own,
which sleeps while the server is measured; its processor time is told. Then requests come
by chance, at rates given or as shares of what the server did. Figures are medians over rounds, ratios are taken within
a round, and the time per token is that of a whole round divided by its tokens: prefill, HTTP and the client included.

V1 `:predict` does not stream. So the time to the first token (TTFT) is that of requests for one token: of every
client's first prompt, sent at once before the clients' run, and of one arrival in five. The time between tokens (ITL)
is (latency of N tokens - latency of one) / (N - 1). In the JSON the engine has both also as its tokens came.
Speculation is off: random weights repeat themselves and would be guessed.

Probes, the answers' equality and memory are measured apart from the rates. The client shares the server's cores, so it
is one that takes little; what it takes is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/server.py` finds what `python -m benchmarks.server` does

from benchmarks.contestants import machine  # noqa: E402
from benchmarks.contestants.process import WorkerError, wait_until_idle  # noqa: E402
from benchmarks.serving import report  # noqa: E402
from benchmarks.serving.client import V1, Refused, open_session, probe  # noqa: E402
from benchmarks.serving.figures import (  # noqa: E402
    SYSTEMS,
    Load,
    Percentiles,
    Sample,
    SchedulerFigure,
    System,
    Usage,
    summarise,
    verdicts,
)
from benchmarks.serving.load import Run, Served, run_arrivals, run_clients  # noqa: E402
from benchmarks.serving.processes import EngineProcess, ServerProcess, settings_of  # noqa: E402
from benchmarks.serving.scheduling import time_steps  # noqa: E402
from benchmarks.serving.workload import (  # noqa: E402
    FIRST_TOKEN_SHARE,
    Arrival,
    Ask,
    Lengths,
    Mix,
    first_tokens,
)

SCHEDULER_SEQUENCES = (1, 32, 64)
SCHEDULER_STEPS = 5_000
_LOAD_TIMEOUT_S, _RUN_TIMEOUT_S = 900.0, 3600.0


def numbers(text: str) -> list[int]:
    """Parse "1,8,32"; raises `typer.BadParameter`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise typer.BadParameter(f"wanted whole numbers separated by commas, such as 1,8,32; got {text!r}")
    return sorted({int(each) for each in text.split(",")})


def rates(text: str, capacity: Callable[[], float]) -> list[float]:
    """Parse "2,50%": requests/s, or a share of what `capacity()` says; raises `typer.BadParameter`."""
    if not re.fullmatch(r"(\d+(\.\d+)?%?(,\d+(\.\d+)?%?)*)?", text) or any(
        float(each.rstrip("%")) == 0 for each in text.split(",") if each
    ):
        raise typer.BadParameter(f"wanted rates separated by commas, such as 2,4.5 or 25%,50%; got {text!r}")
    found = [
        capacity() * float(each[:-1]) / 100 if each.endswith("%") else float(each) for each in text.split(",") if each
    ]
    return sorted({float(f"{each:.3g}") for each in found})


class Bench:
    """The server, the engine, and a loop to ask the server from."""

    def __init__(self, server: ServerProcess, engine: EngineProcess, mix: Mix) -> None:
        self._server, self._engine, self._mix = server, engine, mix
        self._loop = asyncio.new_event_loop()
        self._sessions = contextlib.AsyncExitStack()
        opening = self._sessions.enter_async_context(open_session(server.url))
        self._session: aiohttp.ClientSession = self._loop.run_until_complete(opening)
        self._target = V1(self._session)
        self.samples: list[Sample] = []

    def close(self) -> None:
        for task in asyncio.all_tasks(self._loop):  # left where one of many failed
            task.cancel()
        self._loop.run_until_complete(self._sessions.aclose())
        self._loop.close()

    def warm_up(self) -> None:
        clients = self._mix.clients(2, 1, seed=-1)
        for system in SYSTEMS:
            self._run_clients(system, clients)

    def clients(self, number: int, system: System, clients: int, requests: int) -> None:
        """A sample of so many clients with so many requests each."""
        asked = self._mix.clients(clients, requests, number)

        def measure() -> tuple[Run, list[Served]]:
            firsts = self._run_clients(system, first_tokens(asked))
            return self._run_clients(system, asked), firsts.served

        self._add(number, system, Load("clients", clients), measure)

    def arrivals(self, number: int, system: System, rate: float, seconds: float) -> None:
        """A sample of requests that come by chance for so long."""
        arrivals = self._mix.arrivals(rate, seconds, number, FIRST_TOKEN_SHARE)

        def measure() -> tuple[Run, list[Served]]:
            run = self._run_arrivals(system, arrivals)
            return run, [served for served in run.served if served.ask.new_tokens == 1]

        if arrivals:
            self._add(number, system, Load("rate", rate), measure)

    def _run_clients(self, system: System, clients: list[list[Ask]]) -> Run:
        if system == "server":
            return self._loop.run_until_complete(run_clients(self._target, clients))
        return self._engine.clients("streams" if system == "streams" else "steps", clients, _RUN_TIMEOUT_S)

    def _run_arrivals(self, system: System, arrivals: list[Arrival]) -> Run:
        if system == "server":
            return self._loop.run_until_complete(run_arrivals(self._target, arrivals))
        return self._engine.arrivals(arrivals, _RUN_TIMEOUT_S)

    def _add(self, number: int, system: System, load: Load, measure: Callable[[], tuple[Run, list[Served]]]) -> None:
        wait_until_idle([self._server, self._engine])  # type: ignore[list-item]
        before, began = self._cpu_s(), time.perf_counter()
        run, firsts = measure()
        seconds = time.perf_counter() - began
        server_s, engine_s, client_s, all_s = (b - a for a, b in zip(before, self._cpu_s(), strict=True))
        own_s, idle_s = (server_s, engine_s) if system == "server" else (engine_s, server_s)
        others_s = max(0.0, all_s - server_s - engine_s - client_s)
        usage = Usage(seconds, own_s, client_s, idle_s, others_s)
        self.samples.append(Sample(number, system, load, run, firsts, usage))

    def _cpu_s(self) -> tuple[float, float, float, float]:
        return self._server.cpu_s(), self._engine.cpu_s(), time.process_time(), machine.busy_s()

    def probed(self, clients: int, rounds: int) -> dict[str, Any]:
        """Readiness asked for while clients wait, and whether company changes an answer."""
        asked = self._mix.clients(clients, 1, seed=-2)
        probes_s: list[float] = []
        together = [self._loop.run_until_complete(self._probed_run(asked, probes_s)) for _ in range(rounds)][-1]
        alone = [self._run_clients("server", [one]).served[0] for one in tqdm(asked, "each alone", unit=" requests")]
        of_engine = self._run_clients("engine", asked)
        probes = Percentiles.ms(probes_s)
        assert probes is not None
        return {
            "probe_p50_ms": probes.p50,
            "probe_p99_ms": probes.p99,
            "probes": probes.count,
            "answers": clients,
            "answers_equal_to_alone": _equal(together.served, alone),
            "answers_equal_to_the_engine": _equal(together.served, of_engine.served),
        }

    async def _probed_run(self, asked: list[list[Ask]], probes_s: list[float]) -> Run:
        probing = asyncio.create_task(probe(self._session, probes_s))
        try:
            return await run_clients(self._target, asked)
        finally:
            probing.cancel()


def _equal(a: list[Served], b: list[Served]) -> int:
    return sum(one.answer == other.answer for one, other in zip(a, b, strict=True))


def memory(server: ServerProcess, model: Path) -> dict[str, Any]:
    files = list(model.glob("*.safetensors")) or list(model.glob("*.bin"))
    weights = sum(path.stat().st_size for path in files)
    peak, kv = server.peak_bytes(), server.kv_bytes()
    return {
        "weights_file_bytes": weights,
        "kv_budget_bytes": kv,
        "peak_bytes": peak,
        # The KV budget counts in full, although only pages that were written are resident.
        "peak_over_1.2_weights_and_kv_budget": peak / (1.2 * weights + kv),
        "peak_over_weights_file": peak / weights,
    }


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"


@contextlib.contextmanager
def both(variables: dict[str, str], timeout_s: float) -> Iterator[tuple[ServerProcess, EngineProcess, dict[str, str]]]:
    """The server first, so that nothing slows its start; then the engine, whose versions of everything are given."""
    server = ServerProcess(variables)
    try:
        with tempfile.TemporaryDirectory() as folder:
            engine = EngineProcess(variables, Path(folder) / "engine.log")
            try:
                yield server, engine, dict(engine.ready(timeout_s).versions)
            finally:
                engine.close()
    finally:
        if server.exit_code is None:
            server.close()


def main(
    model: Annotated[Path, typer.Option(help="A checkpoint folder.", exists=True, file_okay=False)],
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16 or int8, for server and engine.")
    ] = "auto",
    clients: Annotated[str, typer.Option(help="How many clients at once, such as 1,8,32.")] = "1,8,32",
    poisson: Annotated[
        str,
        typer.Option(
            help="Rates of requests that come by chance: requests/s, or shares of what the server did with the most "
            'clients, such as 2,50%; "" leaves them out.'
        ),
    ] = "25%,50%,75%,90%",
    poisson_s: Annotated[float, typer.Option(min=1, help="Seconds of arrivals per rate and round.")] = 15,
    lengths: Annotated[
        Lengths,
        typer.Option(help="fixed, or mixed: log-uniform from a quarter of --words and --tokens to four times."),
    ] = Lengths.fixed,
    words: Annotated[int, typer.Option(min=1, help="Words per prompt, about a token each.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per request.")] = 48,
    requests: Annotated[int, typer.Option(min=1, help="Requests per client and round, one after the other.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Also draw tokens/s and latencies against clients and rate (PNG).")
    ] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 where a bar is missed.")] = False,
) -> None:
    """Serve MODEL, ask server and engine in turn, print tables.

    Both read PREDICTOR_* variables, so PREDICTOR_THREADS=1 measures both with one thread. Clients and server share the
    machine's cores. By default 13 minutes for the 124M model on two cores, half of it Poisson arrivals.
    """
    counts = numbers(clients)
    rates(poisson, lambda: 1.0)  # refused now rather than after the clients
    mix = Mix(lengths, words, tokens)
    variables = settings_of(model, dtype)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    scheduler = [
        SchedulerFigure.of(count, time_steps(count, SCHEDULER_STEPS))
        for count in tqdm(SCHEDULER_SEQUENCES, "scheduler", unit=" sizes")
    ]
    with both(variables, _LOAD_TIMEOUT_S) as (server, engine, versions):
        width, kernels = server.dtype_and_kernels()
        facts: dict[str, Any] = {"port_open_s": server.port_s, "ready_s": server.ready_s}
        head = {
            "model": model.name,
            "dtype": width,
            "kernels": kernels,
            "machine": machine.describe(),
            "revision": revision(),
            "versions": versions,
            "settings": {
                name: value
                for name, value in {**os.environ, **variables}.items()
                if name.startswith("PREDICTOR_") and name != "PREDICTOR_MODEL"
            },
            "load": {"mix": mix.describe(), "requests_per_client": requests, "rounds": rounds, "poisson_s": poisson_s},
            "systems": SYSTEMS,
        }
        title = f"{model.name}, {width}, on {head['machine']['cpu']}, {machine.physical_cores()} cores"
        bench = Bench(server, engine, mix)

        def write() -> None:
            figures = summarise(bench.samples)
            told = verdicts(figures, scheduler)
            if json_file is not None:
                written = head | {
                    "facts": facts,
                    "verdicts": [{"sentence": each.sentence, "met": each.met} for each in told],
                    "scheduler": [
                        {"sequences": s.sequences, "steps": s.steps, "median_us": s.median_us, "p99_us": s.p99_us}
                        for s in scheduler
                    ],
                    "figures": [figure.as_json() for figure in figures],
                }
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps(written, indent=1) + "\n")
            if plot_file is not None:
                plot_file.parent.mkdir(parents=True, exist_ok=True)
                report.plot(figures, plot_file, f"{title}; {mix.describe()}")

        try:
            bench.warm_up()
            with tqdm(list(product(range(rounds), counts, SYSTEMS)), desc="clients", unit=" runs") as bar:
                for number, count, system in bar:
                    bar.set_postfix_str(f"{system}, {count}")
                    bench.clients(number, system, count, requests)
            write()  # a run that is cut short leaves what it measured
            most = Load("clients", counts[-1])
            done = [s.tokens_per_s for s in bench.samples if s.load == most and s.system == "server"]
            mean = FIRST_TOKEN_SHARE + (1 - FIRST_TOKEN_SHARE) * mix.mean_new_tokens
            wanted = rates(poisson, lambda: statistics.median(done) / mean)
            asked: tuple[System, System] = ("server", "streams")
            with tqdm(list(product(range(rounds), wanted, asked)), desc="arrivals", unit=" runs") as bar:
                for number, rate, system in bar:
                    bar.set_postfix_str(f"{system}, {rate:g}/s")
                    bench.arrivals(number, system, rate, poisson_s)
            facts |= bench.probed(counts[-1], rounds) | memory(server, model)
        except (Refused, WorkerError) as error:
            raise SystemExit(str(error)) from error
        finally:
            bench.close()
        facts |= {"load_average": os.getloadavg()[0], "exit_code_on_sigterm": server.close()}
        write()
    figures = summarise(bench.samples)
    told = verdicts(figures, scheduler)
    report.print_tables(console, figures, scheduler, facts, told, title)
    console.print(mix.describe(), highlight=False)
    if check and not all(each.met for each in told):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
