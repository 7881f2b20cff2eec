"""The compiled step's threads and memory: how many, how long they live, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from predictor.model.cpu import threads as threads_module
from predictor.model.cpu.threads import default_threads
from tests.compiled import Part, compile_model, compiled, prompt, run, same_bits, spoilt_kv, step
from tests.conftest import ROOT, tiny_model

__all__ = ["compiled"]


def run_python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------- how many threads


@pytest.mark.parametrize(
    ("logical", "physical", "allowed", "files", "wanted"),
    [
        (8, 8, 8, {}, 8),
        (8, 4, 8, {}, 4),  # two threads a core
        (8, None, 8, {}, 8),  # not known
        (8, 8, 3, {}, 3),  # affinity
        (8, 4, 3, {}, 2),
        (8, 4, 1, {}, 1),
        (8, 8, 8, {"cpu.max": "max 100000\n"}, 8),
        (8, 8, 8, {"cpu.max": "200000 100000\n"}, 2),
        (8, 8, 8, {"cpu.max": "250000 100000\n"}, 3),  # 2.5 CPUs
        (8, 8, 8, {"cpu.max": "50000 100000\n"}, 1),
        (8, 8, 8, {"cpu.max": "1000 100000\n"}, 1),
        (8, 8, 8, {"cpu.max": "1600000 100000\n"}, 8),
        (8, 8, 2, {"cpu.max": "400000 100000\n"}, 2),
        (8, 8, 8, {"cpu.max": "nonsense\n"}, 8),
        (8, 8, 8, {"cpu.max": ""}, 8),
        (8, 8, 8, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (8, 8, 8, {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        (8, 8, 8, {"cpu/cpu.cfs_quota_us": "150000\n"}, 8),
        (1, 1, 1, {"cpu.max": "400000 100000\n"}, 1),
    ],
    ids=str,
)
def test_threads_are_the_cores_that_the_container_may_use(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    logical: int,
    physical: int | None,
    allowed: int,
    files: dict[str, str],
    wanted: int,
) -> None:
    monkeypatch.setattr(threads_module.os, "cpu_count", lambda: logical)
    monkeypatch.setattr(threads_module.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(threads_module.os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert default_threads(tmp_path) == wanted


def test_affinity_of_this_very_process_counts() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    script = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from predictor.model.cpu.threads import default_threads; print(default_threads())"
    )
    assert run_python(script).stdout == "1\n"


# --------------------------------------------------------------------------------------------------- life of threads


def test_models_that_are_dropped_leave_no_threads_and_no_memory() -> None:
    oracle, process = tiny_model(), psutil.Process()
    compile_model(oracle, threads=5)
    gc.collect()
    threads, mapped = process.num_threads(), process.memory_info().vms
    dropped = []
    for _ in range(30):
        model = compile_model(oracle, threads=5)
        dropped.append(weakref.ref(model))
        assert process.num_threads() == threads + 4
        run(model, prompt(model.config.vocabulary, 5), [4, 1])
        del model
    gc.collect()
    assert not any(each() for each in dropped)
    assert process.num_threads() == threads
    assert process.memory_info().vms - mapped < 30 * 2**20  # one model with its workspace takes about 1 MB, 5 stacks 40


def test_a_model_whose_load_fails_leaves_no_threads() -> None:
    oracle, threads = tiny_model(), psutil.Process().num_threads()
    for _ in range(3):
        with pytest.raises(AssertionError):
            compile_model(oracle, threads=5, ln_f__weight=torch.zeros(3))
    gc.collect()
    assert psutil.Process().num_threads() == threads


def test_no_threads_to_be_had_is_an_error_and_not_the_end() -> None:
    """As in a container whose limit of processes is reached; here by a limit on the addresses that stacks take."""
    script = """
import ctypes, resource
from predictor.model.cpu.library import Shape, open_library
library = open_library()
shape = Shape(1, 16, 1, 16, 32, 16, 0, 1, 1, 1e-5)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
print(library.gpt2_new(shape, (ctypes.c_float * 1)(1.0), b"", 1000))
handle = library.gpt2_new(shape, (ctypes.c_float * 1)(1.0), b"", 2)
library.gpt2_free(handle)
print(handle is not None)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    found = run_python(script)
    assert (found.returncode, found.stdout) == (0, "None\nTrue\n"), found.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_may_end_while_a_step_runs(threads: int) -> None:
    """The engine's thread is a daemon: a step that outlasts the grace period still runs when the interpreter ends."""
    script = """
import sys, threading, time
import torch
from tests.compiled import compile_model, prompt, rows_of, Part
from tests.conftest import tiny_model
model = compile_model(tiny_model(n_embd=256, n_layer=4, n_positions=512), threads=int(sys.argv[1]))
ids, kv = prompt(model.config.vocabulary, 512), model.new_kv(512)
rows = rows_of([Part(ids, 0, 512, 0)])
def work():
    while True:
        model.forward(rows, kv)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    found = run_python(script, threads)
    assert (found.returncode, found.stderr) == (0, "")


def test_any_thread_may_call_one_after_the_other() -> None:
    model = compile_model(tiny_model(), threads=3)
    ids, results = prompt(model.config.vocabulary, 40), []
    for _ in range(5):
        thread = threading.Thread(target=lambda: results.append(run(model, ids, [39, 1])))
        thread.start()
        thread.join()
    results.append(run(model, ids, [39, 1]))
    assert all(same_bits(each, results[0]) for each in results)


def test_models_side_by_side_do_not_disturb_each_other() -> None:
    """Each has threads of its own, more than there are cores, and its caller's."""
    oracle = tiny_model()
    ids = prompt(oracle.config.vocab_size, 60)
    wanted, failures = run(compile_model(oracle), ids, [60]), []

    def work(threads: int) -> None:
        model = compile_model(oracle, threads=threads)
        for _ in range(5):
            if not same_bits(run(model, ids, [50, *[1] * 10]), wanted):
                failures.append(threads)

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_steps_are_right_while_other_processes_take_the_cores() -> None:
    model = compile_model(tiny_model(), threads=2)
    chance, kv = random.Random(0), spoilt_kv(model, 256)
    ids = [prompt(model.config.vocabulary, 128, seed) for seed in range(2)]
    wanted = [run(model, each, [128]) for each in ids]
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        began, done = time.monotonic(), [0, 0]
        for _ in range(200):
            parts = []
            for i in chance.sample(range(2), chance.randint(1, 2)):
                done[i] %= 128
                count = min(chance.choice([1, 1, 1, 2, 16]), 128 - done[i])
                parts.append((i, Part(ids[i], done[i], count, 128 * i)))
                done[i] += count
            for (i, part), logits in zip(parts, step(model, kv, [part for _, part in parts]), strict=True):
                assert same_bits(logits, wanted[i][part.first : part.first + part.count])
        # A thread whose partner lost its core must give up its own, not spin out its slice of some ms at each barrier.
        assert time.monotonic() - began < 20
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_a_step_uses_the_threads_it_was_given_and_they_sleep_between() -> None:
    model = compile_model(tiny_model(), threads=3)
    run(model, prompt(model.config.vocabulary, 5), [5])
    time.sleep(0.05)
    before = psutil.Process().cpu_times()
    time.sleep(0.5)
    after = psutil.Process().cpu_times()
    assert (after.user - before.user) + (after.system - before.system) < 0.1, "threads spin while nothing is asked"


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_loaded_model_takes_its_packed_bytes_and_little_more(tmp_path: Path) -> None:
    """Resident memory as the system counts it, in a process of its own: at rest, and at its peak while loading."""
    script = """
import sys
from pathlib import Path
import torch
from predictor.checkpoints.load import load_compiled, read_config
from predictor.model.config import parse_config
from predictor.model.cpu.gpt2 import packed_bytes
from tests.compiled import prompt, run

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
config = parse_config(read_config(folder))
for width in ("int8", "bfloat16", "float32"):  # narrow first: the heap that a wider one leaves behind is not counted
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = resident("VmRSS")
    model = load_compiled(folder, width, threads=1)
    after, peak = resident("VmRSS"), resident("VmHWM")
    run(model, prompt(config.vocabulary, 16), [15, 1])
    used = resident("VmRSS")
    print(width, packed_bytes(config, width), after - before, peak - before, used - before)
    del model
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    tiny_model(n_layer=4, n_embd=512, n_head=8, vocab_size=8000, n_positions=256).save_pretrained(tmp_path)
    found = run_python(script, tmp_path)
    assert found.returncode == 0, found.stderr
    table_bytes = 8000 * 512 * 4  # the largest tensor of the file
    for line in found.stdout.splitlines():
        width, packed, after, peak, used = line.split()
        allowed = 1.02 * int(packed) + 4 * 2**20
        assert int(after) <= allowed, f"{width}: {after} of {packed}"
        assert int(peak) <= allowed + table_bytes, f"{width}: {peak} of {packed}"
        assert int(used) <= allowed + 8 * 2**20, f"{width}: {used} of {packed}"
