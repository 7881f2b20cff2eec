"""A checkpoint folder into a model on its device: config, memory check, weights, with progress."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from predictor.checkpoints.tensors import TensorFiles
from predictor.errors import CheckpointError, LoadCancelled, NotEnoughMemory
from predictor.model.config import GPT2Config, parse_config
from predictor.model.gpt2 import GPT2

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
    done = 0
    with TensorFiles(folder) as files:

        def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
            nonlocal done
            if stop is not None and stop.is_set():
                raise LoadCancelled("told to stop while loading")
            tensor = files.fetch(name, shape)
            done += tensor.numel()
            if progress is not None:
                progress(min(done, config.parameters), config.parameters)
            return tensor

        return GPT2(config, fetch, dtype, device)


def check_memory(config: GPT2Config, dtype: torch.dtype, device: torch.device, kv_bytes: int) -> None:
    """Raise `NotEnoughMemory`, with figures, if the weights and `kv_bytes` do not fit what is free."""
    weights = weight_bytes(config, dtype, device)
    needed, free = weights + kv_bytes + _OVERHEAD_BYTES, free_bytes(device)
    if needed > free:
        raise NotEnoughMemory(
            f"the model needs {gib(needed)} on {device.type} ({gib(weights)} of weights in "
            f"{str(dtype).removeprefix('torch.')}, {gib(kv_bytes)} of KV memory, {gib(_OVERHEAD_BYTES)} to work in) "
            f"and {gib(free)} are free; choose a narrower --dtype, less --kv-memory-mib, or a larger machine"
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
