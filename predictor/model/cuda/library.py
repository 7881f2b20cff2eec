"""Our CUDA kernels as Python functions over tensors, called through ctypes on torch's current stream.

None of them waits for the device, allocates on it or reads from it, so all may be captured in a graph.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_char_p, c_float, c_int, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from predictor.errors import EngineFailed
from predictor.model.cuda.build import libraries, library_path

logger = logging.getLogger(__name__)

# As `enum Format` in common.cuh.
_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the blocks of one attention leave their parts; kernels of one stream may share it.

    partials [B, H, splits, D + 2] fp32; arrived [B, H] int32, zero between launches.
    """

    partials: Tensor
    arrived: Tensor
    splits: int


class Kernels:
    """The functions of one compiled library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.error_text.argtypes, library.error_text.restype = [c_int], c_char_p
        library.decode_attention.argtypes = [c_int, *[c_void_p] * 8, *[c_int] * 4, c_float, c_void_p]
        library.add_norm.argtypes = [c_int, *[c_void_p] * 5, c_int, c_int, c_float, c_void_p]
        library.uniform.argtypes = [*[c_void_p] * 3, c_int, c_void_p]
        self._library = library
        self._split_tokens: int = library.decode_attention_split_tokens()

    def refuses(self, head_width: int, width: int) -> str | None:
        """Why a model of this shape cannot be computed here; None when it can."""
        for what, value, most in (
            ("heads", head_width, self._library.decode_attention_widest_head()),
            ("rows", width, self._library.add_norm_widest_row()),
        ):
            if value > most:
                return f"{what} of {value} numbers are wider than the kernels' {most}"
        return None

    def workspace(self, rows: int, heads: int, head_width: int, context: int, device: torch.device) -> Workspace:
        """For up to `rows` sequences of up to `context` tokens."""
        splits = -(-context // self._split_tokens)
        return Workspace(
            torch.empty((rows, heads, splits, head_width + 2), dtype=torch.float32, device=device),
            torch.zeros((rows, heads), dtype=torch.int32, device=device),
            splits,
        )

    def decode_attention(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        first_slots: Tensor,
        positions: Tensor,
        out: Tensor,
        workspace: Workspace,
        scale: float,
    ) -> None:
        """Store the new keys and values of B sequences, and write to out [>= B, H, D] what each new token sees.

        qkv [>= B, 3, H, D]; keys, values [slots, H, D]; first_slots, positions [B] int64: the slot where a sequence
        begins, and the new token's position in it. No position may reach the context of the workspace.
        """
        B, (_, H, D) = len(positions), keys.shape
        _check_layout(qkv, keys, values, out, first_slots, positions)
        assert qkv.dtype == keys.dtype == values.dtype == out.dtype
        tensors = (qkv, keys, values, first_slots, positions, out, workspace.partials, workspace.arrived)
        pointers = [tensor.data_ptr() for tensor in tensors]
        sizes = (B, H, D, workspace.splits)
        self._launch(self._library.decode_attention, qkv.device, _FORMATS[qkv.dtype], *pointers, *sizes, scale)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, out: Tensor) -> None:
        """x += y in place, unless y is None, and out = layer norm of x.

        x [R, E] fp32; weight, bias [E] fp32; y, out [R, E] of one dtype.
        """
        R, E = x.shape
        _check_layout(x, weight, bias, out)
        if y is not None:
            _check_layout(y)
            assert y.dtype == out.dtype
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (x, y, weight, bias, out)]
        self._launch(self._library.add_norm, x.device, _FORMATS[out.dtype], *pointers, R, E, epsilon)

    def uniform(self, seeds: Tensor, counts: Tensor) -> Tensor:
        """`engine.philox.uniform` on the device: seeds, counts [B] int64 -> [B] fp64; seeds are the bits of uint64."""
        _check_layout(seeds, counts)
        numbers = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
        pointers = [tensor.data_ptr() for tensor in (seeds, counts, numbers)]
        self._launch(self._library.uniform, seeds.device, *pointers, len(seeds))
        return numbers

    def _launch(self, function: Any, device: torch.device, *arguments: object) -> None:
        """Call it with torch's current stream as its last argument."""
        if device.type == "cuda":
            with torch.cuda.device(device):
                status = function(*arguments, torch.cuda.current_stream().cuda_stream)
        else:
            status = function(*arguments, None)
        if status:
            raise EngineFailed(f"CUDA error {status}: {self._library.error_text(status).decode()}")


def _check_layout(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernels count on row-major tensors"


def load_kernels(device: torch.device, head_width: int, width: int) -> Kernels | None:
    """The kernels for a model of this shape on this device; None, and a line in the log, where they cannot serve."""
    reason = _why_not_built()
    if reason is None:
        try:
            kernels = Kernels(library_path())
            reason = kernels.refuses(head_width, width)
            if reason is None:
                # A library without code for this GPU loads, and fails at the first launch.
                one = torch.zeros(1, dtype=torch.int64, device=device)
                kernels.uniform(one, one)
                return kernels
        except (OSError, EngineFailed) as error:
            reason = str(error)
    logger.warning("without our CUDA kernels: torch's attention serves, and no CUDA graphs: %s", reason)
    return None


def _why_not_built() -> str | None:
    path, command = library_path(), "python -m predictor.model.cuda.build"
    if path.exists():
        return None
    others = [other.name for other in libraries()]
    if others:
        return f"{', '.join(others)} was built from other sources than these ({path.name}); run {command}"
    return f"they are not built; run {command}, which needs nvcc"
