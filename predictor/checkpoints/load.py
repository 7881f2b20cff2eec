"""A checkpoint folder into a model on its device: config, memory check, weights, with progress."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from predictor.checkpoints.tensors import TensorFiles, trim_heap
from predictor.errors import CheckpointError, ConfigurationError, LoadCancelled, NotEnoughMemory
from predictor.model.config import GPT2Config, Width, parse_config
from predictor.model.cpu.gpt2 import CPUGPT2, packed_bytes, unsupported
from predictor.model.cpu.library import WIDTHS, instruction_set
from predictor.model.gpt2 import GPT2, Fetch

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# progress(parameters done, parameters in all)
Progress = Callable[[int, int], None]

# Beside weights and KV: torch itself, activations of a step, the tensor being converted. Measured on CPU: 0.4 GB.
_OVERHEAD_BYTES = 512 * 2**20


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no config.json: is it a Hugging Face checkpoint?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return fields


def load_gpt2(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kv_bytes: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> GPT2:
    """Load GPT-2's weights straight into `dtype` on `device`.

    `kv_bytes` is what the caller will allocate next; it counts in the memory check. Setting `stop` ends the load
    at the next tensor with `LoadCancelled`.
    """
    config = parse_config(read_config(folder))
    check_memory(config, dtype, device, kv_bytes)
    with TensorFiles(folder) as files:
        fetch = _telling_fetch(files, config, progress, stop)

        def fetch_after_copies(name: str, shape: tuple[int, ...]) -> Tensor:
            trim_heap()  # of the transposed copies made since the last tensor
            return fetch(name, shape)

        return GPT2(config, fetch_after_copies, dtype, device)


def load_compiled(
    folder: Path,
    width: Width,
    *,
    threads: int,
    kv_bytes: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> CPUGPT2:
    """Load GPT-2's weights into the CPU kernels, packed as `width`; the rest as `load_gpt2`."""
    config = parse_config(read_config(folder))
    _check_memory(packed_bytes(config, width), width, torch.device("cpu"), kv_bytes)
    with TensorFiles(folder) as files:
        return CPUGPT2(config, _telling_fetch(files, config, progress, stop), width, threads)


def load_model(
    folder: Path,
    width: Width,
    device: torch.device,
    *,
    threads: int,
    kv_bytes: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> GPT2 | CPUGPT2:
    """The model that serves `width` on `device`: on CPU our kernels, or torch, said in the log, where they cannot."""
    if device.type == "cpu" and width in WIDTHS:
        lacking = why_not_compiled(parse_config(read_config(folder)), width)
        if lacking is None:
            return load_compiled(folder, width, threads=threads, kv_bytes=kv_bytes, progress=progress, stop=stop)
        if width == "int8":
            raise ConfigurationError(f"--dtype int8 needs the CPU kernels: {lacking}")
        logger.warning("torch serves, which is slower than the CPU kernels: %s", lacking)
    torch.set_num_threads(threads)
    dtype = TORCH_DTYPES[width]
    return load_gpt2(folder, dtype, device, kv_bytes=kv_bytes, progress=progress, stop=stop)


def why_not_compiled(config: GPT2Config, width: Width) -> str | None:
    """What keeps the CPU kernels from serving this model; None where nothing does."""
    try:
        best = instruction_set()
    except OSError as error:
        return str(error)
    # The generic kernels are right on any CPU, and slower than torch; int8 has nothing else.
    if best == "generic" and width != "int8":
        return "this CPU has no AVX2"
    return unsupported(config)


def _telling_fetch(
    files: TensorFiles, config: GPT2Config, progress: Progress | None, stop: threading.Event | None
) -> Fetch:
    """`files.fetch` that reports progress, and raises `LoadCancelled` once `stop` is set."""
    done = 0

    def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal done
        if stop is not None and stop.is_set():
            raise LoadCancelled("told to stop while loading")
        tensor = files.fetch(name, shape)
        done += tensor.numel()
        if progress is not None:
            progress(min(done, config.parameters), config.parameters)
        return tensor

    return fetch


def check_memory(config: GPT2Config, dtype: torch.dtype, device: torch.device, kv_bytes: int) -> None:
    """Raise `NotEnoughMemory`, with figures, if the weights and `kv_bytes` do not fit what is free."""
    _check_memory(weight_bytes(config, dtype, device), str(dtype).removeprefix("torch."), device, kv_bytes)


def _check_memory(weights: int, width: str, device: torch.device, kv_bytes: int) -> None:
    needed, free = weights + kv_bytes + _OVERHEAD_BYTES, free_bytes(device)
    if needed > free:
        raise NotEnoughMemory(
            f"the model needs {gib(needed)} on {device.type} ({gib(weights)} of weights in {width}, "
            f"{gib(kv_bytes)} of KV memory, {gib(_OVERHEAD_BYTES)} to work in) and {gib(free)} are free; choose a "
            "narrower --dtype, less KV memory (--kv-memory-mib of serve), or a larger machine"
        )


def weight_bytes(config: GPT2Config, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes the loaded weights occupy; on CPU in fp32 the output matrix is packed apart from the token table."""
    numbers = config.parameters
    if device.type == "cpu" and dtype == torch.float32 and config.tied_embeddings:
        numbers += config.vocabulary * config.width
    return numbers * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory this process may still take on `device`, container limits counted in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _container_free_bytes(Path("/sys/fs/cgroup")))


def _container_free_bytes(root: Path) -> int:
    """What the container's limit leaves; without a limit, more than any machine has.

    The page cache counts against the limit and is given up when memory is asked for: it is free.
    """
    for limit, used, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
         ("total_inactive_file", "total_active_file")),
    ):  # fmt: skip
        # Another version of cgroups, or a limit of "max".
        with contextlib.suppress(OSError, ValueError):
            taken = int((root / used).read_text())
            rows = (line.split() for line in (root / statistics).read_text().splitlines())
            reclaimable = sum(int(count) for name, count in rows if name in cache)
            return int((root / limit).read_text()) - taken + reclaimable
    return 2**63


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
