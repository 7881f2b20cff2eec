"""Measure a server over HTTP: one client against many, probes meanwhile, memory, and that company changes no answer.

    python benchmarks/make_checkpoint.py --size gpt2 --out /path/to/gpt2
    python benchmarks/server.py --model /path/to/gpt2 --json benchmarks/results/server-gpt2.json

Rounds of one client and of many are interleaved; the figures are medians over rounds. The clients run on the same
machine and take their share of its cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

WORDS = ["the", "king", "shall", "not", "come", "to", "my", "house", "until", "night", "has", "fallen", "over", "hills"]


def machine() -> str:
    """The CPU as Linux names it, its cores and memory."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = psutil.virtual_memory().total / 2**30
    return f"{names[0]}, {len(names)} cores, {memory:.0f} GiB, {platform.system()}"


def prompts(count: int, words: int) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choice(WORDS) for _ in range(words)) for _ in range(count)]


class Server:
    """`python -m predictor serve` on a free loopback port."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - lives as long as the server
        command = [sys.executable, "-m", "predictor", "serve", "--model", f"aitextgen={model}", "--host", "127.0.0.1"]
        self.began = time.perf_counter()
        self.process = subprocess.Popen([*command, "--port", str(port), *flags], stdout=self.log, stderr=self.log)
        self.port_s = self._wait(lambda code: True)
        self.ready_s = self._wait(lambda code: code == 200)

    def _wait(self, done: Any) -> float:
        with httpx.Client(base_url=self.url) as client:  # one, because making one takes as long as an answer
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if done(client.get("/v1/models/aitextgen").status_code):
                        return time.perf_counter() - self.began
                if self.process.poll() is not None:
                    raise SystemExit(f"the server ended:\n{Path(self.log.name).read_text()}")
                time.sleep(0.1)

    def peak_bytes(self) -> int:
        """The largest resident set so far, from Linux."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def kv_bytes(self) -> float:
        return float(Path(self.log.name).read_text().split("KV memory: ")[1].split()[0]) * 2**30

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def ask(client: httpx.AsyncClient, prompt: str, tokens: int, seed: int) -> str:
    parameters = {"max_new_tokens": tokens, "seed": seed, "ignore_eos": True}
    body = {"instances": [prompt], "parameters": parameters}
    response = await client.post("/v1/models/aitextgen:predict", json=body)
    response.raise_for_status()
    return str(response.json()["predictions"][0])


async def round_of(client: httpx.AsyncClient, asked: list[str], tokens: int) -> tuple[float, list[str]]:
    """Every prompt at once, a client each: tokens per second, and the answers."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(client, prompt, tokens, seed) for seed, prompt in enumerate(asked)))
    return len(asked) * tokens / (time.perf_counter() - began), answers


async def probe(client: httpx.AsyncClient, times_s: list[float]) -> None:
    while True:
        began = time.perf_counter()
        (await client.get("/v1/models/aitextgen")).raise_for_status()
        times_s.append(time.perf_counter() - began)
        await asyncio.sleep(0.02)


async def measure(url: str, clients: int, tokens: int, words: int, rounds: int) -> dict[str, Any]:
    asked = prompts(clients, words)
    alone_rates, together_rates, probes_s = [], [], []
    together: list[str] = []
    limits = httpx.Limits(max_connections=clients + 2)
    async with (
        httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client,
        httpx.AsyncClient(base_url=url, timeout=3600) as prober,
    ):
        await round_of(client, asked[:2], 4)  # warm up
        for _ in tqdm(range(rounds), desc="rounds", unit=" rounds"):
            rate, _ = await round_of(client, asked[:1], tokens)
            alone_rates.append(rate)
            probing = asyncio.create_task(probe(prober, probes_s))
            rate, together = await round_of(client, asked, tokens)
            probing.cancel()
            together_rates.append(rate)
        same = 0
        for seed, prompt in enumerate(tqdm(asked, desc="each alone", unit=" requests")):
            same += await ask(client, prompt, tokens, seed) == together[seed]
    return {
        "clients": clients,
        "new_tokens": tokens,
        "rounds": rounds,
        "one_client_tokens_per_s": statistics.median(alone_rates),
        "many_clients_tokens_per_s": statistics.median(together_rates),
        "ratio": statistics.median(b / a for a, b in zip(alone_rates, together_rates, strict=True)),
        "answers_equal_to_alone": same,
        "probe_p50_ms": statistics.median(probes_s) * 1e3,
        "probe_p99_ms": statistics.quantiles(probes_s, n=100)[98] * 1e3,
        "probes": len(probes_s),
    }


def main(
    model: Annotated[Path, typer.Option(help="A checkpoint folder.")],
    clients: Annotated[int, typer.Option(help="How many at once.")] = 32,
    tokens: Annotated[int, typer.Option(help="New tokens per request.")] = 48,
    words: Annotated[int, typer.Option(help="Words per prompt.")] = 16,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    flags: Annotated[str, typer.Option(help="More flags for serve, as one string.")] = "",
) -> None:
    """Serve MODEL, measure, print a table."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    server = Server(model, flags.split())
    try:
        figures = asyncio.run(measure(server.url, clients, tokens, words, rounds))
        peak, kv = server.peak_bytes(), server.kv_bytes()
        figures |= {
            "model": model.name,
            "flags": flags,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "port_open_s": server.port_s,
            "ready_s": server.ready_s,
            "weights_file_bytes": weights,
            "kv_budget_bytes": kv,
            "peak_bytes": peak,
            # The KV budget counts in full, although only pages that were written are resident.
            "peak_over_1.2_weights_and_kv_budget": peak / (1.2 * weights + kv),
            "peak_over_weights_file": peak / weights,
            "load_average": os.getloadavg()[0],
        }
    finally:
        figures_exit = server.close()
    figures["exit_code_on_sigterm"] = figures_exit
    table = Table(title=f"{model.name} on {figures['machine']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
