"""What needs a CUDA device. Without one these tests are not collected, and a line of the summary says so.

They need torch, numpy and pytest alone, and nvcc where the kernels are not built yet; see docs/gpu.md.
"""

from __future__ import annotations

import pytest
import torch

from predictor.model.cuda import build
from predictor.model.cuda.library import Kernels, load_kernels
from tests.gpu.models import DEVICE

_MISSING = not torch.cuda.is_available()
collect_ignore_glob = ["test_*.py"] if _MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _MISSING:
        terminalreporter.line("tests/gpu was not collected: torch sees no CUDA device here")


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """The kernels for this GPU, compiled now unless they were before."""
    if not build.library_path().exists():
        major, minor = torch.cuda.get_device_capability()
        build.build("nvcc", [10 * major + minor])


@pytest.fixture(scope="session", autouse=True)
def exact_sums(built: None) -> None:
    """As backends/device.py sets them for a server."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@pytest.fixture(scope="session")
def kernels(built: None) -> Kernels:
    loaded = load_kernels(DEVICE, 64, 768)
    assert loaded is not None
    return loaded
