"""Measure GPT-2 engines side by side in one run: ours, transformers, aitextgen, CTranslate2, llama.cpp, OpenVINO GenAI.

    make bench-peers                                    # both shapes, environments made where they are missing
    python -m benchmarks.peers --shape gpt2 --rounds 5

Each contestant is a process of its own with one model. Contestants of a width are asked in turn (A B C A B C), with the
same random prompts, greedily, without an end token; figures are medians over rounds, ratios are taken within a round.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/peers.py` finds what `python -m benchmarks.peers` does

from benchmarks.contestants import machine, report  # noqa: E402
from benchmarks.contestants.contest import ORACLE_TOKENS, Account, Contest, plan_groups  # noqa: E402
from benchmarks.contestants.figures import OURS, Figure, best_peer, missed_bars, ratio, summarise  # noqa: E402
from benchmarks.contestants.roster import CONTESTANTS, NOT_TAKING_PART, REFERENCE  # noqa: E402
from benchmarks.contestants.workload import Cell, Shape  # noqa: E402

ShapeName = Enum("ShapeName", {"gpt2": "gpt2", "gpt2-xl": "gpt2-xl"}, type=str)

# Batches of the 1.5B stop where a round of every engine would take hours.
BATCHES = {"gpt2": (1, 4, 16, 32), "gpt2-xl": (1, 4, 16)}
LONG_BATCHES = {"gpt2": (1, 8), "gpt2-xl": (1,)}
ROUNDS = {"gpt2": 5, "gpt2-xl": 3}
PROMPT_TOKENS = 16
CONTEXTS = (128, 400)  # between the short and the long, at batch 1: for the plot
LONG_PROMPT_TOKENS = 850
CONTEXT = 1024
MEMORY_SHARE = 0.85  # of what is available, for the workers of a group
PROCESS_BYTES = 5e8  # Python with its libraries


def numbers(text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Parse "1,4,16"; raises `typer.BadParameter`."""
    if text is None:
        return tuple(default)
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", text):
        raise typer.BadParameter(f"wanted whole numbers separated by commas, such as 1,4,16; got {text!r}")
    return tuple(int(each) for each in text.split(",") if each)


def needed_bytes(shape: Shape, bits: int, most_tokens: int) -> float:
    """Weights, and keys and values of the largest cell."""
    return shape.weight_bytes(bits) + shape.kv_bytes(bits, most_tokens)


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def figures_of(contest: Contest) -> tuple[list[Figure], dict[int, float]]:
    """The figures so far, and the memory bound at batch 1 in tokens/s per width."""
    fastest = max(contest.reads_bytes_per_s)
    bounds = {bits: fastest / contest.shape.step_bytes(bits) for bits in (32, 16, 8)}
    bits = {name: account.contestant.bits for name, account in contest.accounts.items()}
    return summarise(contest.samples, bits, bounds), bounds


def account_json(account: Account, shape: Shape, most_tokens: int) -> dict[str, Any]:
    contestant, ready = account.contestant, account.ready
    told: dict[str, Any] = {"bits": contestant.bits, "settings": {**contestant.settings, **contestant.variables}}
    if account.reason:
        told["reason"] = account.reason
    if ready is not None:
        needed = needed_bytes(shape, contestant.bits, most_tokens)
        told |= {
            "versions": ready.versions,
            "import_s": ready.import_s,
            "load_s": ready.load_s,
            "imported_bytes": ready.imported_bytes,
            "peak_bytes": account.peak_bytes,
            "peak_over_weights_and_kv": account.peak_bytes / needed,
            "peak_less_imports_over_weights_and_kv": (account.peak_bytes - ready.imported_bytes) / needed,
            "idle_cpu_s_per_s": account.idle_share,
            "tokens_agreeing": account.agreeing_tokens,
        }
    return told


def results(contest: Contest, shape_name: str) -> dict[str, Any]:
    figures, bounds = figures_of(contest)
    short = Cell(PROMPT_TOKENS, 1)
    return {
        "shape": shape_name,
        "machine": machine.describe(),
        "revision": revision(),
        "new_tokens": contest.new_tokens,
        "rounds": contest.rounds,
        "read_bytes_per_s": max(contest.reads_bytes_per_s),
        "each_read_bytes_per_s": contest.reads_bytes_per_s,
        "batch_1_bound_tokens_per_s": bounds,
        "tokens_compared": ORACLE_TOKENS,
        "contestants": {
            name: account_json(account, contest.shape, contest.most_tokens)
            for name, account in contest.accounts.items()
        },
        "not_taking_part": NOT_TAKING_PART,
        "best_peers": [
            {"bits": bits, "cell": str(cell), "peer": peer.contestant, "ours_over_it": peer.ours_over_it}
            for bits in (32, 16, 8)
            for cell in contest.cells
            if (peer := best_peer(figures, bits, cell)) is not None
        ],
        "int8_over_transformers_float32": ratio(contest.samples, OURS[8], REFERENCE.name, short),
        "missed": missed(contest, shape_name),
        "figures": [figure.as_json() for figure in figures],
    }


def missed(contest: Contest, shape_name: str) -> list[str]:
    int8 = ratio(contest.samples, OURS[8], REFERENCE.name, Cell(PROMPT_TOKENS, 1)) if shape_name == "gpt2" else None
    agreement = {
        name: account.agreeing_tokens / ORACLE_TOKENS
        for name, account in contest.accounts.items()
        if account.contestant.bits == 32 and account.agreeing_tokens is not None
    }
    return missed_bars(figures_of(contest)[0], int8, agreement)


def main(
    shape: Annotated[ShapeName, typer.Option(help="Which of OpenAI's shapes.")] = ShapeName.gpt2,
    rounds: Annotated[int | None, typer.Option(min=1, help="Interleaved rounds; by default 5, of gpt2-xl 3.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batches of 16-token prompts, such as 1,4,16.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Prompt lengths at batch 1, for the plot.")] = None,
    long_batches: Annotated[str | None, typer.Option(help='Batches of 850-token prompts; "" leaves them out.')] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 48,
    only: Annotated[str, typer.Option(help="A regular expression: contestants to keep, such as 'ours|llama'.")] = "",
    work: Annotated[
        Path, typer.Option(help="Where checkpoints and conversions are kept; of gpt2-xl 35 GB.", show_default=False)
    ] = ROOT / "build/peers",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Figures; by default benchmarks/results/peers-SHAPE.json.")
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(help="For one group; by default 85% of what is free.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest answer waited for.")] = 1200,
    check: Annotated[bool, typer.Option(help="Exit with 1 and name each bar that was missed.")] = False,
) -> None:
    """Measure every engine at SHAPE, print tables, write JSON and a plot beside it after every group."""
    name = shape.value
    cells = [Cell(PROMPT_TOKENS, batch) for batch in numbers(batches, BATCHES[name])]
    cells += [Cell(tokens, 1) for tokens in numbers(contexts, CONTEXTS)]
    cells += [Cell(LONG_PROMPT_TOKENS, batch) for batch in numbers(long_batches, LONG_BATCHES[name])]
    cells = sorted(set(cells))
    if not cells:
        raise typer.BadParameter("nothing to measure: give --batches, --contexts or --long-batches a number")
    if cells[-1].prompt_tokens + new_tokens > CONTEXT:
        raise typer.BadParameter(f"{cells[-1].prompt_tokens} + {new_tokens} tokens are more than GPT-2's {CONTEXT}")
    contest = Contest(work.resolve() / name, cells, new_tokens, rounds or ROUNDS[name], timeout_s)
    contest.enter([each for each in CONTESTANTS if re.search(only, each.name) or each == REFERENCE])
    out = json_file or ROOT / f"benchmarks/results/peers-{name}.json"
    console = Console(width=None if sys.stdout.isatty() else 180)  # in a file, rows should stay rows
    contest.make_checkpoint(name)
    entered = [account.contestant for account in contest.accounts.values()]
    for contestant in tqdm(entered, desc="conversions", unit=" models"):
        contest.convert(contestant)
    oracle = contest.oracle()

    able = [each for each in entered if contest.accounts[each.name].reason is None and re.search(only, each.name)]
    needed = {bits: needed_bytes(contest.shape, bits, contest.most_tokens) for bits in (32, 16, 8, 4)}
    guesses = {each.name: 1.2 * needed[each.bits] + PROCESS_BYTES for each in able}
    free = memory_gib * 2**30 if memory_gib else psutil.virtual_memory().available * MEMORY_SHARE
    groups = plan_groups(able, guesses, free)
    title = f"{name} on {machine.describe()['cpu']}, {machine.physical_cores()} cores"
    with tqdm(total=len(groups) * len(cells) * (contest.rounds + 1), desc=name, unit=" rounds") as bar:
        for group in groups:
            contest.run_group(group, oracle, bar)
            if contest.samples:
                write(contest, name, out, title)
    if not contest.samples:
        reasons = [f"{account.contestant.name}: {account.reason}" for account in contest.accounts.values()]
        raise SystemExit("nobody could be measured:\n" + "\n".join(reasons))
    report.print_tables(console, figures_of(contest)[0], list(contest.accounts.values()), needed, title)
    for engine, reason in NOT_TAKING_PART.items():
        console.print(f"{engine} does not take part: {reason}")
    for sentence in missed(contest, name):
        console.print(f"missed: {sentence}")
    if check and missed(contest, name):
        raise SystemExit(1)


def write(contest: Contest, shape_name: str, out: Path, title: str) -> None:
    """The figures so far, so that a run that is cut short leaves what it measured."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results(contest, shape_name), indent=1) + "\n")
    report.plot(figures_of(contest)[0], out.with_suffix(".png"), title)


if __name__ == "__main__":
    typer.run(main)
