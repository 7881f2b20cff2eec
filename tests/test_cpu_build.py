"""Building the CPU kernels, and what happens where they are missing or cannot serve: torch does, and says so."""

from __future__ import annotations

import logging
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from predictor.checkpoints import load
from predictor.checkpoints.load import load_compiled, load_model
from predictor.errors import ConfigurationError
from predictor.model.config import parse_config
from predictor.model.cpu import build, library
from predictor.model.cpu.gpt2 import CPUGPT2, packed_bytes, unsupported
from predictor.model.gpt2 import GPT2
from predictor.text.language_model import LanguageModel
from predictor.text.request import TextRequest
from tests.compiled import CPU, INSTRUCTION_SETS, WIDTHS, compiled, prompt, run
from tests.conftest import ROOT, open_quietly, tiny_model

__all__ = ["compiled"]


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    """Loading a model sets how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- building


class Copy:
    """The package's sources in a folder of their own, never built, and a compiler that writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kernels = folder, folder / "predictor" / "model" / "cpu"
        shutil.copytree(
            ROOT / "predictor" / "model" / "cpu", self.kernels, ignore=shutil.ignore_patterns("build", "__pycache__")
        )
        for package in (self.kernels.parent, self.kernels.parent.parent):
            (package / "__init__.py").touch()
        self.log = folder / "log"
        self.compiler = folder / "compiler"
        self.compiler.write_text(
            f'#!/bin/sh\necho "$@" >> {self.log}\n'
            'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo made > "$2"; fi; shift; done\n'
        )
        self.compiler.chmod(self.compiler.stat().st_mode | stat.S_IXUSR)

    def build(self, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "predictor.model.cpu.build", *flags]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def libraries(self) -> list[str]:
        return sorted(path.name for path in (self.kernels / "build").glob("*"))

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_a_build_that_may_fail_says_so_and_succeeds(copy: Copy, compiler: str) -> None:
    strict, optional = copy.build("--compiler", compiler), copy.build("--compiler", compiler, "--optional")
    assert (strict.returncode, optional.returncode) == (1, 0)
    for each in (strict, optional):
        assert "the CPU kernels were not compiled; torch will serve on CPU, more slowly" in each.stderr
        assert "Traceback" not in each.stderr
    assert copy.libraries() == []


def test_what_the_compiler_said_is_told(copy: Copy) -> None:
    copy.compiler.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such thing' >&2\nexit 4\n")
    assert "error: no such thing" in copy.build("--compiler", str(copy.compiler)).stderr


def test_a_folder_that_cannot_be_written_is_no_crash(copy: Copy) -> None:
    (copy.kernels / "build").write_text("a file where the folder should be")
    found = copy.build("--compiler", str(copy.compiler), "--optional")
    assert (found.returncode, "not compiled" in found.stderr, "Traceback" in found.stderr) == (0, True, False)


def test_a_build_that_is_up_to_date_is_left_alone(copy: Copy) -> None:
    first = copy.build("--compiler", str(copy.compiler))
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"compiled {copy.libraries()[0]}\n"
    commands = copy.commands()
    assert sum("kernels.cpp" in command for command in commands) == len(build.instruction_sets())
    second = copy.build("--compiler", "false")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert copy.commands() == commands


@pytest.mark.parametrize("name", ["kernels.cpp", "api.cpp", "simd.h"])
def test_other_sources_are_another_library_and_the_stale_one_goes(copy: Copy, name: str) -> None:
    copy.build("--compiler", str(copy.compiler))
    stale = copy.libraries()
    with (copy.kernels / name).open("a") as source:
        source.write("// changed\n")
    copy.build("--compiler", str(copy.compiler))
    assert len(copy.libraries()) == 1
    assert copy.libraries() != stale


def test_builds_at_the_same_time_end_in_one_library(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two containers share a folder, or a test run begins while `make setup` runs: all link at one moment."""
    linked, compile_ = threading.Barrier(8), build._run

    def compile_together(command: list[str]) -> None:
        compile_(command)
        if "-shared" in command:
            linked.wait(timeout=60)

    monkeypatch.setattr(build, "FOLDER", copy.kernels)
    monkeypatch.setattr(build, "_run", compile_together)
    for round_ in range(4):
        with (copy.kernels / "simd.h").open("a") as source:
            source.write(f"// {round_}\n")
        with ThreadPoolExecutor(8) as pool:
            builds = [pool.submit(build.build, str(copy.compiler)) for _ in range(8)]
        assert {each.result().name for each in builds} == set(copy.libraries())
        assert len(copy.libraries()) == 1


def test_the_generic_kernels_are_linked_before_those_that_need_more_of_a_cpu(copy: Copy) -> None:
    """The linker keeps the first of several equal functions (templates that were not inlined): generic code then."""
    copy.build("--compiler", str(copy.compiler))
    (link,) = (command.split() for command in copy.commands() if "-shared" in command.split())
    objects = [Path(word).stem for word in link if word.endswith(".o")]
    kernels = [name for name in objects if name.startswith("kernels_")]
    assert kernels[0] == "kernels_generic"
    assert set(objects) - set(kernels) == {"api", "pool"}


# ------------------------------------------------------------------------------------------------------- the library


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No library of these sources: never built, or built of others."""
    with monkeypatch.context() as patch:
        patch.setattr(library, "library_path", lambda: tmp_path / "gpt2-0123456789abcdef.so")
        library.open_library.cache_clear()
        yield
    library.open_library.cache_clear()


@pytest.mark.usefixtures("missing")
def test_a_missing_library_says_what_to_do(checkpoint: Path) -> None:
    config = parse_config(tiny_model().config.to_dict())
    for use in (
        library.open_library,
        library.instruction_set,
        lambda: packed_bytes(config, "int8"),
        lambda: load_compiled(checkpoint, "float32", threads=1),
    ):
        with pytest.raises(OSError, match=r"python -m predictor\.model\.cpu\.build"):
            use()


def test_a_damaged_library_is_an_oserror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpt2-0123456789abcdef.so"
    path.write_bytes(b"no library")
    with monkeypatch.context() as patch:
        patch.setattr(library, "library_path", lambda: path)
        library.open_library.cache_clear()
        with pytest.raises(OSError, match="gpt2-0123456789abcdef"):
            library.open_library()
    library.open_library.cache_clear()


def test_instruction_sets_are_named_and_what_is_not_there_is_refused(checkpoint: Path) -> None:
    assert library.instruction_set() == INSTRUCTION_SETS[-1]
    assert library.instruction_set("generic") == "generic"
    assert library.instruction_set("avx9") is None
    config = parse_config(tiny_model().config.to_dict())
    with pytest.raises(OSError, match="this CPU lacks avx9"):
        CPUGPT2(config, lambda name, shape: torch.zeros(shape), "float32", 1, "avx9")


def test_more_of_a_cpu_is_never_assumed() -> None:
    """Each set that this CPU is said to have is in the flags that Linux tells, where it tells them."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    flags = next((set(line.split()[2:]) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no flags of an x86 CPU here")
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    needs = {"generic": set(), "avx2": avx2, "avx512": avx512, "avx512_bf16": avx512 | {"avx512_bf16"}}
    assert [name for name, need in needs.items() if need <= flags] == INSTRUCTION_SETS


# ------------------------------------------------------------------------------------------------------ falling back


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("width", ["float32", "bfloat16"])
async def test_torch_serves_where_the_kernels_are_missing(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, width: str
) -> None:
    backend = open_quietly(checkpoint, dtype=width)
    try:
        (warning,) = warnings_of(caplog)
        assert "torch serves" in warning
        assert "python -m predictor.model.cpu.build" in warning
        assert backend.dtype == width
        ((answer,),) = await LanguageModel(backend).generate([TextRequest("hello", max_new_tokens=8, seed=1)], 60)
        assert answer.completion_tokens > 0
    finally:
        backend.stop()
        backend.join(10)


@pytest.mark.usefixtures("missing")
def test_int8_is_refused_where_the_kernels_are_missing(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--dtype int8 needs the CPU kernels: .*predictor\.model\.cpu\.build"):
        open_quietly(checkpoint, dtype="int8")


async def test_torch_and_the_kernels_say_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled: the same tokens, and log-probabilities near each other."""
    requests = [
        TextRequest(prompt, max_new_tokens=20, seed=seed, temperature=temperature, logprobs=0)
        for seed, (prompt, temperature) in enumerate([("hello", 0.0), ("the word", 0.7), ("banana " * 9, 1.0)])
    ]
    answers = []
    for reason in (None, "asked for"):
        if reason:
            monkeypatch.setattr(load, "why_not_compiled", lambda config, width: "asked for")
        backend = open_quietly(checkpoint)
        try:
            answers.append([each for (each,) in await LanguageModel(backend).generate(requests, 60)])
        finally:
            backend.stop()
            backend.join(10)
    for ours, torchs in zip(*answers, strict=True):
        assert ours.text == torchs.text
        theirs = [each.logprob for each in torchs.logprobs]
        assert [each.logprob for each in ours.logprobs] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_head": 8}, "n_embd / n_head is 8, no multiple of 16"),
        ({"n_embd": 72, "n_head": 1}, "n_embd is 72, no multiple of 16"),
        ({"n_inner": 100}, "n_inner is 100, no multiple of 16"),
    ],
)
def test_shapes_the_kernels_cannot_run_are_torchs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, width: str, changes: dict[str, int], reason: str
) -> None:
    oracle = tiny_model(**changes)
    oracle.save_pretrained(tmp_path)
    assert unsupported(parse_config(oracle.config.to_dict())) == reason
    if width == "int8":
        with pytest.raises(ConfigurationError, match=f"--dtype int8 needs the CPU kernels: {reason}"):
            load_model(tmp_path, width, CPU, threads=1)
        return
    model = load_model(tmp_path, width, CPU, threads=1)
    assert isinstance(model, GPT2)
    (warning,) = warnings_of(caplog)
    assert reason in warning
    assert run(model, prompt(model.config.vocabulary, 20), [19, 1]).isfinite().all()


def test_a_cpu_without_avx2_is_served_by_torch_and_int8_by_generic_kernels(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "instruction_set", lambda: "generic")
    for width in ("float32", "bfloat16"):
        caplog.clear()
        assert isinstance(load_model(checkpoint, width, CPU, threads=1), GPT2)
        (warning,) = warnings_of(caplog)
        assert "this CPU has no AVX2" in warning
    caplog.clear()
    assert isinstance(load_model(checkpoint, "int8", CPU, threads=1), CPUGPT2)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("width", [*WIDTHS, "float16"])
def test_the_kernels_serve_what_they_can(checkpoint: Path, caplog: pytest.LogCaptureFixture, width: str) -> None:
    model = load_model(checkpoint, width, CPU, threads=1)
    assert isinstance(model, GPT2 if width == "float16" else CPUGPT2)
    assert not warnings_of(caplog)
