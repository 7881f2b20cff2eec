"""The run: checkpoint, conversions, groups of workers that fit in memory, interleaved rounds. Knows no engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks.contestants import machine
from benchmarks.contestants.figures import OURS, Sample
from benchmarks.contestants.process import Answer, Ready, Worker, WorkerError, idle_shares, wait_until_idle
from benchmarks.contestants.roster import REFERENCE, Contestant
from benchmarks.contestants.workload import Cell, Shape

ROOT = Path(__file__).resolve().parents[2]
_ORACLE = Cell(prompt_tokens=16, batch=4)
_ORACLE_NEW_TOKENS = 16
ORACLE_TOKENS = _ORACLE.batch * _ORACLE_NEW_TOKENS  # compared with each contestant
_LOAD_TIMEOUT_S = 900.0

PYTHONS = {
    "project": Path(sys.executable),
    "aitextgen": ROOT / ".venv-aitextgen/bin/python",
    "peers": ROOT / ".venv-peers/bin/python",
}
_MAKE = {"aitextgen": "make aitextgen-env", "peers": "make bench-peers"}


@dataclass(slots=True)
class Account:
    """What became of one contestant, besides its samples."""

    contestant: Contestant
    reason: str | None = None  # why it has no figures, or not all
    ready: Ready | None = None
    peak_bytes: int = 0
    idle_share: float | None = None  # CPU seconds per second while idle
    agreeing_tokens: int | None = None  # of the reference's


@dataclass(slots=True)
class Contest:
    """One shape's run; `samples` and `accounts` fill as it goes."""

    work: Path  # <work>/checkpoint, and a folder per conversion
    cells: Sequence[Cell]
    new_tokens: int
    rounds: int
    timeout_s: float
    samples: list[Sample] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    _groups: int = field(default=0, init=False)
    reads_bytes_per_s: list[float] = field(default_factory=list)  # one a group and cell

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint"

    @property
    def shape(self) -> Shape:
        return Shape.from_config(json.loads((self.checkpoint / "config.json").read_text()))

    @property
    def most_tokens(self) -> int:
        return max(cell.batch * (cell.prompt_tokens + self.new_tokens) for cell in self.cells)

    def enter(self, contestants: Sequence[Contestant]) -> None:
        self.accounts = {each.name: Account(each) for each in contestants}

    def make_checkpoint(self, size: str) -> None:
        if (self.checkpoint / "config.json").is_file():  # written last
            return
        command = [sys.executable, str(ROOT / "benchmarks/make_checkpoint.py"), "--size", size]
        subprocess.run([*command, "--out", str(self.checkpoint)], check=True, cwd=ROOT)

    def convert(self, contestant: Contestant) -> None:
        """Make what it loads unless an earlier run did; a failure becomes its reason."""
        target = self._model(contestant)
        if contestant.conversion is None or target.is_dir():
            return
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = self._command("convert", contestant, self.checkpoint)
        command += ["--out", str(partial), "--conversion", contestant.conversion]
        log = self._log(contestant, "convert")
        try:
            with log.open("w") as out:
                subprocess.run(command, stdout=out, stderr=out, check=True, cwd=ROOT)
            partial.rename(target)
        except OSError as error:
            self._drop(contestant, f"cannot start {command[0]} ({error.strerror}){_advice(contestant)}")
        except subprocess.CalledProcessError as error:
            lines = log.read_text(errors="replace").strip().splitlines()
            said = lines[-1].strip() if lines else f"status {error.returncode}"
            self._drop(contestant, f"conversion failed: {said}{_advice(contestant)}")

    def oracle(self) -> list[list[int]] | None:
        """The reference's tokens, which every 32-bit engine must repeat; None where it does not run."""
        try:
            with self._worker(REFERENCE) as (worker, _):
                return self._ask(worker, _ORACLE, seed=0, new_tokens=_ORACLE_NEW_TOKENS).ids
        except WorkerError as error:
            self._drop(REFERENCE, str(error))
            return None

    def run_group(self, group: Sequence[Contestant], oracle: list[list[int]] | None, bar: tqdm) -> None:
        """Start all, check their tokens, interleave the rounds, stop all. `bar` counts rounds, a warm-up each cell."""
        number = self._groups
        self._groups += 1
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for contestant in group:
                account = self.accounts[contestant.name]
                bar.set_postfix_str(f"{contestant.name} loads")
                try:
                    worker, account.ready = stack.enter_context(self._worker(contestant))
                    first = self._ask(worker, _ORACLE, seed=0, new_tokens=_ORACLE_NEW_TOKENS).ids
                except WorkerError as error:
                    self._drop(contestant, str(error))
                    continue
                workers[contestant.name] = worker
                if oracle is not None:
                    account.agreeing_tokens = agreeing(oracle, first)
            wait_until_idle(list(workers.values()))
            for name, share in idle_shares(workers).items():
                self.accounts[name].idle_share = share
            for cell in self.cells:
                wait_until_idle(list(workers.values()))
                self.reads_bytes_per_s.append(machine.read_bytes_per_s(machine.physical_cores()))
                self._run_cell(number, cell, workers, bar)
            for name, worker in workers.items():
                self.accounts[name].peak_bytes = max(self.accounts[name].peak_bytes, worker.peak_bytes())

    def _run_cell(self, group: int, cell: Cell, workers: dict[str, Worker], bar: tqdm) -> None:
        for number in range(-1, self.rounds):  # round -1 warms up
            for name, worker in list(workers.items()):
                bar.set_postfix_str(f"{name}, {cell}")
                wait_until_idle(list(workers.values()))
                try:
                    if number < 0:
                        self._ask(worker, cell, seed=-1, new_tokens=min(self.new_tokens, 8))
                    else:
                        self.samples.append(self._sample(group, number, name, cell, worker))
                except WorkerError as error:
                    del workers[name]
                    self._drop(self.accounts[name].contestant, f"{cell}: {error}")
                    worker.close()
            bar.update()

    def _sample(self, group: int, number: int, name: str, cell: Cell, worker: Worker) -> Sample:
        # Other prompts than below, so that no engine can remember their prefix.
        first = self._ask(worker, cell, seed=-2 - number, new_tokens=1)
        busy_s, own_s = machine.busy_s(), worker.cpu_s()
        whole = self._ask(worker, cell, seed=number, new_tokens=self.new_tokens)
        others_s = max(0.0, (machine.busy_s() - busy_s) - (worker.cpu_s() - own_s))
        others_share = min(1.0, others_s / (whole.seconds * machine.physical_cores()))
        return Sample(group, number, name, cell, self.new_tokens, whole.seconds, first.seconds, others_share)

    def _ask(self, worker: Worker, cell: Cell, seed: int, new_tokens: int) -> Answer:
        return worker.generate(cell.prompts(seed, self.shape.vocabulary), new_tokens, self.timeout_s)

    @contextmanager
    def _worker(self, contestant: Contestant) -> Iterator[tuple[Worker, Ready]]:
        threads = machine.physical_cores()
        command = self._command("serve", contestant, self._model(contestant))
        command += ["--settings", json.dumps(dict(contestant.settings)), "--threads", str(threads)]
        command += ["--most-sequences", str(max(cell.batch for cell in self.cells))]
        command += ["--most-tokens", str(self.most_tokens)]
        variables = {"OMP_NUM_THREADS": str(threads), **contestant.variables}
        try:
            worker = Worker(command, self._log(contestant, "serve"), ROOT, variables)
        except WorkerError as error:
            raise WorkerError(f"{error}{_advice(contestant)}") from None
        try:
            yield worker, worker.ready(_LOAD_TIMEOUT_S)
        finally:
            worker.close()

    def _command(self, action: str, contestant: Contestant, model: Path) -> list[str]:
        python = str(PYTHONS[contestant.environment])
        return [python, "-m", "benchmarks.contestants.worker", action, contestant.engine, "--model", str(model)]

    def _model(self, contestant: Contestant) -> Path:
        if contestant.conversion is None:
            return self.checkpoint
        return self.work / f"{contestant.engine}-{contestant.conversion}"

    def _log(self, contestant: Contestant, action: str) -> Path:
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{contestant.name.replace(' ', '-')}-{action}.log"

    def _drop(self, contestant: Contestant, reason: str) -> None:
        self.accounts[contestant.name].reason = reason


def _advice(contestant: Contestant) -> str:
    make = _MAKE.get(contestant.environment)
    return f"; `{make}` makes its environment" if make and not PYTHONS[contestant.environment].exists() else ""


def agreeing(expected: list[list[int]], given: list[list[int]]) -> int:
    """Tokens that are the same at the same place."""
    return sum(a == b for want, have in zip(expected, given, strict=True) for a, b in zip(want, have, strict=True))


def plan_groups(
    contestants: Sequence[Contestant], needs_bytes: Mapping[str, float], budget_bytes: float
) -> list[list[Contestant]]:
    """Groups that fit in memory together: widths apart, ours in every one; with int8, the reference too.

    A group has at least one peer, even where that does not fit.
    """
    groups = []
    for widths in ((32,), (16,), (8, 4)):
        fixed = [each for each in contestants if each.name == OURS[widths[0]]]
        if fixed and widths[0] == 8:
            fixed += [each for each in contestants if each.name == REFERENCE.name]
        peers = [each for each in contestants if each.bits in widths and each not in fixed]
        fixed_bytes = sum(needs_bytes[each.name] for each in fixed)
        group, held = list(fixed), fixed_bytes
        for peer in peers:
            if len(group) > len(fixed) and held + needs_bytes[peer.name] > budget_bytes:
                groups.append(group)
                group, held = list(fixed), fixed_bytes
            group.append(peer)
            held += needs_bytes[peer.name]
        if group:
            groups.append(group)
    return groups
