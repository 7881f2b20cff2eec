"""Which device and which number format, checked against what this torch build can do."""

from __future__ import annotations

import torch

from predictor.backends.base import DtypeName
from predictor.checkpoints.load import TORCH_DTYPES
from predictor.errors import ConfigurationError
from predictor.model.config import Width


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device {name} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        _check_cuda(device)
        # Half-precision products are summed in fp32: what makes FP16 right. torch's default allows narrower sums.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif device.type != "cpu":
        raise ConfigurationError(f"--device {name} is not served; use auto, cpu, cuda or cuda:N")
    return device


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "no CUDA device can be used: check nvidia-smi, and that torch is a CUDA build (TORCH_INDEX in the Makefile)"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigurationError(f"--device {device} does not exist: there are {torch.cuda.device_count()} devices")
    major, minor = torch.cuda.get_device_capability(device)
    # Binaries of one major version run on later minors of it.
    built = [architecture.removeprefix("sm_") for architecture in torch.cuda.get_arch_list()]
    if not any(int(a[:-1]) == major and int(a[-1]) <= minor for a in built if a.isdigit()):
        raise ConfigurationError(
            f"this torch build has no code for {torch.cuda.get_device_name(device)} (sm_{major}{minor}; it has "
            f"{', '.join(built)}): install the cu126 wheels, `make setup TORCH_INDEX=https://download.pytorch.org/whl/cu126`"
        )


def choose_width(name: DtypeName, device: torch.device) -> Width:
    """`auto` is float16 on CUDA and float32 on CPU."""
    if name == "auto":
        return "float16" if device.type == "cuda" else "float32"
    if name == "int8" and device.type != "cpu":
        raise ConfigurationError("--dtype int8 is served on the CPU only; use float16 or bfloat16")
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise ConfigurationError("this GPU has no bfloat16 (it needs compute capability 8.0); use float16")
    return name


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """`choose_width` for a backend that knows torch's formats alone."""
    width = choose_width(name, device)
    if width == "int8":
        raise ConfigurationError("--dtype int8 is served by --backend engine; use float32, bfloat16 or float16")
    return TORCH_DTYPES[width]
