"""The machine that measures: its name, its cores, how fast it reads memory, and what else it is doing."""

from __future__ import annotations

import mmap
import platform
import time
from pathlib import Path

import psutil

_BUFFER_BYTES = 3 * 2**29  # 1.5 GiB: no cache holds it


def physical_cores() -> int:
    return psutil.cpu_count(logical=False) or 1


def describe() -> dict[str, object]:
    # A hypervisor may hide the model's name; its family and number tell generations apart.
    lines = (line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    said = {name.strip(): value.strip() for name, value in lines}
    return {
        "cpu": said.get("model name", platform.machine()),
        "cpu_family_and_model": f"{said.get('cpu family', '?')}, {said.get('model', '?')}",
        "cores": physical_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_bytes_per_s(threads: int, repeats: int = 5) -> float:
    """The fastest of several passes over a large buffer on large pages: what reading weights once could reach."""
    import torch  # here, because it takes seconds and the rest of this module is wanted without it

    torch.set_num_threads(threads)
    memory = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    words = torch.frombuffer(memory, dtype=torch.int64).fill_(1)
    # Which of the kernels reads fastest depends on the CPU.
    kernels = (words.sum, words.view(torch.float32).sum, words.view(torch.int8).amax)
    best_s = float("inf")
    for read in kernels * repeats:
        began = time.perf_counter()
        read()
        best_s = min(best_s, time.perf_counter() - began)
    return _BUFFER_BYTES / best_s


def busy_s() -> float:
    """CPU seconds of all cores so far in which anybody computed, a hypervisor's other guests included."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal
