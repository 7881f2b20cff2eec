"""The pure parts of benchmarks/server.py, its client against a small server, and its engine against the real one."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import statistics
import time
from pathlib import Path

import pytest
import typer
from aiohttp import web
from rich.console import Console

from benchmarks.server import numbers, rates
from benchmarks.serving import report
from benchmarks.serving.alone import Alone, told
from benchmarks.serving.client import V1, Refused, open_session, probe
from benchmarks.serving.figures import Load, Percentiles, Sample, SchedulerFigure, Usage, summarise, verdicts
from benchmarks.serving.load import Reply, Run, Served, run_arrivals, run_clients
from benchmarks.serving.processes import settings_of
from benchmarks.serving.scheduling import time_steps
from benchmarks.serving.workload import Arrival, Ask, Lengths, Mix, first_tokens
from predictor.protocols import v1
from predictor.settings import load_settings

FIXED = Mix(Lengths.fixed, 16, 48)
MIXED = Mix(Lengths.mixed, 16, 48)


def test_the_same_seed_asks_the_same_and_no_two_requests_share_a_seed() -> None:
    clients = FIXED.clients(8, 3, seed=1)
    assert clients == FIXED.clients(8, 3, seed=1)
    assert clients != FIXED.clients(8, 3, seed=2)
    asks = [ask for number in (1, 2) for asks in FIXED.clients(8, 3, number) for ask in asks]
    assert len({ask.seed for ask in asks}) == len(asks) == 48
    assert {len(ask.prompt.split()) for ask in asks} == {16}
    assert {ask.new_tokens for ask in asks} == {48}


def test_a_body_is_a_request_that_the_server_takes() -> None:
    ask = Ask("to my house", 48, 2**48)
    (row,) = v1.parse(json.loads(ask.body), v1.Limits(64, 300)).rows
    assert (row.request.prompt, row.request.max_new_tokens, row.request.seed) == ("to my house", 48, 2**48)
    assert row.request.ignore_eos


def test_mixed_lengths_keep_what_is_said_of_them() -> None:
    asks = [ask for asks in MIXED.clients(100, 40, seed=0) for ask in asks]
    words, tokens = [len(ask.prompt.split()) for ask in asks], [ask.new_tokens for ask in asks]
    assert (min(words), max(words)) == (4, 64)
    assert (min(tokens), max(tokens)) == (12, 192)
    assert MIXED.describe().startswith("prompts of 4 to 64 words, answers of 12 to 192 tokens")
    assert statistics.mean(tokens) == pytest.approx(MIXED.mean_new_tokens, rel=0.05)
    assert statistics.median(tokens) == pytest.approx(48, rel=0.1)  # log-uniform: half below the middle
    assert Mix(Lengths.mixed, 1, 2).clients(1, 1, 0)[0][0].new_tokens >= 2


def test_arrivals_are_a_poisson_process_with_requests_for_one_token_among_them() -> None:
    arrivals = FIXED.arrivals(rate=20, seconds=500, seed=3, first_token_share=0.2)
    assert arrivals == FIXED.arrivals(20, 500, 3, 0.2)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]
    assert min(gaps) > 0
    assert arrivals[-1].at_s < 500
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.05)  # that of an exponential is its mean
    assert sum(each.ask.new_tokens == 1 for each in arrivals) / len(arrivals) == pytest.approx(0.2, abs=0.02)


def test_numbers_and_rates_are_parsed_or_refused() -> None:
    assert numbers("32,1,8,8") == [1, 8, 32]
    for wrong in ("", "0", "1,,2", "many"):
        with pytest.raises(typer.BadParameter, match="such as 1,8,32"):
            numbers(wrong)
    assert rates("50%,2", lambda: 10.0) == [2.0, 5.0]
    assert rates("33.3%", lambda: 10.0) == [3.33]
    assert rates("", lambda: 1.0) == []
    for wrong in ("0", "-1", "2,", "half", "0%"):
        with pytest.raises(typer.BadParameter, match=r"such as 2,4.5"):
            rates(wrong, lambda: 1.0)


class Slow:
    """Answers after a time per token, and counts who is there."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def ask(self, ask: Ask) -> Reply:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001 * ask.new_tokens)
        self.now -= 1
        return Reply(ask.seed)


async def test_each_client_waits_for_its_answer_before_it_asks_again() -> None:
    target, clients = Slow(), FIXED.clients(4, 3, seed=0)
    run = await run_clients(target, clients)
    assert target.most == 4
    assert [each.ask for each in run.served] == [ask for asks in clients for ask in asks]
    assert [each.answer for each in run.served] == [each.ask.seed for each in run.served]
    assert run.tokens == 4 * 3 * 48
    assert run.seconds >= sum(each.latency_s for each in run.served[:3])


async def test_times_of_arrivals_count_from_when_they_were_due() -> None:
    class Blocking:
        async def ask(self, ask: Ask) -> Reply:
            time.sleep(0.05)  # noqa: ASYNC251 - a client that cannot keep up
            return Reply("")

    run = await run_arrivals(Blocking(), [Arrival(0.0, Ask("a", 2, number)) for number in range(3)])
    assert max(each.latency_s for each in run.served) >= 0.15  # the third was due with the first


async def test_the_client_reads_answers_and_says_what_a_refusal_said() -> None:
    seen = []

    async def predict(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append((request.headers["content-type"], body))
        if body["instances"] == ["no"]:
            return web.json_response({"error": "not that"}, status=400)
        return web.json_response({"predictions": ["text"]})

    async def ready(request: web.Request) -> web.Response:
        return web.json_response({"ready": True})

    app = web.Application()
    app.router.add_post("/v1/models/aitextgen:predict", predict)
    app.router.add_get("/v1/models/aitextgen", ready)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with open_session(f"http://127.0.0.1:{port}") as session:
            reply = await V1(session).ask(Ask("yes", 4, 9))
            with pytest.raises(Refused, match=r"answered 400: .*not that"):
                await V1(session).ask(Ask("no", 4, 9))
            times_s: list[float] = []
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(probe(session, times_s), 0.5)
    finally:
        await runner.cleanup()
    assert reply == Reply("text", None)
    assert times_s
    assert seen[0] == ("application/json", json.loads(Ask("yes", 4, 9).body))


def served(seed: int, new_tokens: int, latency_s: float, first_s: float | None = None) -> Served:
    return Served(Ask("a", new_tokens, seed), latency_s, first_s, "")


def sample(system: str, clients: int, seconds: float, number: int = 0, idle_s: float = 0.0) -> Sample:
    """So many clients with one request of 11 tokens each, all done after `seconds`; the first token took 0.1 s."""
    streams = None if system == "server" else 0.1
    run = Run(seconds, [served(seed, 11, seconds, streams) for seed in range(clients)])
    firsts = [served(seed, 1, 0.1, streams) for seed in range(clients)]
    usage = Usage(seconds + 0.1, own_s=1.2, client_s=0.011, idle_s=idle_s, others_s=0.0)
    return Sample(number, system, Load("clients", clients), run, firsts, usage)  # type: ignore[arg-type]


def test_figures_are_medians_and_ratios_are_taken_within_a_round() -> None:
    # The machine is half as fast in round 1, for everyone.
    samples = [
        sample(system, 32, seconds * slow, number)
        for number, slow in ((0, 1.0), (1, 2.0), (2, 1.0))
        for system, seconds in (("server", 1.1), ("streams", 1.05), ("engine", 1.0))
    ]
    server, streams, engine = summarise(samples)
    assert [server.system, streams.system, engine.system] == ["server", "streams", "engine"]
    assert server.over_engine == pytest.approx(1.1)
    assert server.over_streams == pytest.approx(1.1 / 1.05)
    assert engine.over_engine is None
    assert server.tokens_per_s.median == pytest.approx(32 * 11 / 1.1)
    assert server.tokens_per_s.min == pytest.approx(32 * 11 / 2.2)
    assert server.first_token_ms is not None
    assert server.first_token_ms.p50 == pytest.approx(100)
    assert server.inter_token_ms is not None
    assert server.inter_token_ms.p50 == pytest.approx(100)  # (1.1 s - 0.1 s) / 10
    assert server.streamed_first_token_ms is None
    assert engine.streamed_inter_token_ms is not None
    assert engine.streamed_inter_token_ms.p50 == pytest.approx(90)  # (1 s - 0.1 s) / 10
    assert server.cpu_ms_per_token == pytest.approx(1200 / (32 * 12))
    assert server.client_share == pytest.approx(0.033 / (1.2 + 2.3 + 1.2))
    assert json.loads(json.dumps(server.as_json()))["clients"] == 32


def test_between_tokens_uses_the_same_prompt_s_first_token_or_the_usual_one() -> None:
    usage = Usage(1, 1, 0, 0, 0)
    run = Run(1.0, [served(1, 11, 1.1), served(2, 11, 1.4), served(3, 11, 9.0)])
    paired = Sample(0, "server", Load("clients", 2), run, [served(1, 1, 0.1), served(2, 1, 0.4)], usage)
    assert paired.inter_token_s() == pytest.approx([0.1, 0.1])  # the third came in other company
    chance = Run(1.0, [served(1, 11, 1.2), served(2, 1, 0.2), served(3, 1, 0.1), served(4, 1, 0.9)])
    usual = Sample(0, "server", Load("rate", 2), chance, chance.served[1:], usage)
    assert usual.inter_token_s() == pytest.approx([0.1])
    assert usual.all_tokens == 14
    assert Sample(0, "server", Load("rate", 2), chance, [], usage).inter_token_s() == []
    assert summarise([usual])[0].over_engine is None
    assert Percentiles.ms([]) is None


def test_bars_are_met_missed_or_said_not_to_be_measured() -> None:
    quick, slow = SchedulerFigure.of(32, [100e-6] * 100), SchedulerFigure.of(32, [300e-6] * 100)
    good = verdicts(summarise([sample("server", 32, 1.09), sample("engine", 32, 1.0)]), [quick])
    assert [each.met for each in good] == [True, True, True]
    assert good[0].sentence.startswith("at 32 clients the server adds +9.0% to the engine's time per token")
    assert "0.100 ms a step" in good[1].sentence
    bad = verdicts(summarise([sample("server", 32, 1.2, idle_s=0.1), sample("engine", 32, 1.0)]), [slow])
    assert [each.met for each in bad] == [False, False, False]
    assert "was not measured" in verdicts(summarise([sample("server", 8, 1.0)]), [])[0].sentence


def test_the_scheduler_is_timed_while_sequences_come_and_go() -> None:
    for sequences in (1, 32):
        times_s = time_steps(sequences, 60)
        assert len(times_s) == 60
        assert all(0 < each < 1 for each in times_s)


def test_the_tables_and_the_plot_are_made(tmp_path: Path) -> None:
    samples = [
        sample(system, clients, 1.0 + clients / 32, idle_s=0.0)
        for system in ("server", "streams", "engine")
        for clients in (1, 8, 32)
    ]
    chance = Run(1.0, [served(1, 11, 1.2), served(2, 1, 0.2)])
    usage = Usage(1, 1, 0, 0, 0)
    samples += [
        Sample(0, system, Load("rate", rate), chance, chance.served[1:], usage)  # type: ignore[arg-type]
        for system in ("server", "streams")
        for rate in (2.0, 4.5)
    ]
    figures, scheduler = summarise(samples), [SchedulerFigure.of(32, [1e-4, 2e-4])]
    console = Console(record=True, width=160, file=io.StringIO())
    report.print_tables(console, figures, scheduler, {"ready_s": 4.0}, verdicts(figures, scheduler), "gpt2")
    text = console.export_text()
    assert "32 clients" in text
    assert "4.5/s" in text
    assert "met: with 32 sequences the scheduler takes 0.150 ms" in text
    report.plot(figures, tmp_path / "plot.png", "gpt2")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    report.plot([each for each in figures if each.load.kind == "clients"], tmp_path / "clients.png", "gpt2")


def test_the_engine_alone_gives_the_same_answers_both_ways(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(checkpoint, "float32").items():
        monkeypatch.setenv(name, value)
    settings = load_settings({})
    assert not settings.speculation
    alone = Alone(settings)
    clients = Mix(Lengths.mixed, 4, 6).clients(5, 2, seed=0)
    streams, steps = alone.streams(clients), alone.steps(clients)
    chance = alone.arrivals([Arrival(0.01 * place, asks[0]) for place, asks in enumerate(clients)])
    firsts = alone.steps(first_tokens(clients))
    assert [each.ask for each in streams.served] == [each.ask for each in steps.served]
    assert [each.answer for each in streams.served] == [each.answer for each in steps.served]
    assert [each.answer for each in chance.served] == [each.answer for each in steps.served][::2]
    for run in (streams, steps, chance, firsts):
        assert all(each.first_token_s is not None and 0 < each.first_token_s <= each.latency_s for each in run.served)
        assert len(json.loads(json.dumps(told(run)))["latencies_s"]) == len(run.served)
    assert [each.ask.new_tokens for each in firsts.served] == [1] * 5
