"""How many threads to compute with."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import psutil


def default_threads(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """One per physical core, of those that this process and its container may use.

    A container's quota counts in whole threads, rounded up: with more threads than that, all of them are halted
    together for a part of every period.
    """
    logical = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    per_core = max(1, logical // (psutil.cpu_count(logical=False) or logical))
    return max(1, min(-(-allowed // per_core), _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """CPUs the container may use; more than any machine has where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):
        version_1 = cgroup / "cpu"
        quota_us = int((version_1 / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            return math.ceil(quota_us / int((version_1 / "cpu.cfs_period_us").read_text()))
    return 2**16
