"""The compiled kernels, as typed Python functions. No tensors are kept here: callers own what pointers point to."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

from predictor.model.cpu.build import library_path

WIDTHS = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {None: 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
FORMATS = {"float32": 0, "float16": 1, "bfloat16": 2}

# Tokens whose keys and values lie together (model.h TOKENS): ranges of slots begin at multiples of it.
TOKENS_PER_BLOCK = 16
# Blocks in a group (model.h GROUP_BLOCKS).
BLOCKS_PER_GROUP = 8
# Outputs are computed in blocks of this many (model.h BLOCK): rows of logits are as long.
OUTPUTS_PER_BLOCK = 32


class Shape(ctypes.Structure):
    """model.h Shape."""

    _fields_ = (
        ("layers", c_int32), ("width", c_int32), ("heads", c_int32), ("inner", c_int32), ("vocabulary", c_int32),
        ("context", c_int32), ("number_width", c_int32), ("activation", c_int32), ("tied", c_int32),
        ("epsilon", c_float),
    )  # fmt: skip


class Step(ctypes.Structure):
    """model.h Step."""

    _fields_ = (
        ("rows", c_int32), ("spans", c_int32), ("wanted", c_int32), ("token_ids", c_void_p), ("span", c_void_p),
        ("wanted_rows", c_void_p), ("logits", c_void_p), ("logits_stride", c_int64),
    )  # fmt: skip


class Draw(ctypes.Structure):
    """model.h Draw."""

    _fields_ = (
        ("row", c_int32), ("greedy", c_int32), ("top_k", c_int32), ("unused", c_int32),
        ("temperature", c_double), ("top_p", c_double), ("seed", c_uint64), ("position", c_uint64),
    )  # fmt: skip


# Result and arguments of each function in api.cpp.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gpt2_instruction_set": (c_char_p, (c_char_p,)),
    "gpt2_weight_bytes": (c_size_t, (POINTER(Shape),)),
    "gpt2_new": (c_void_p, (POINTER(Shape), POINTER(c_float), c_char_p, c_int32)),
    "gpt2_free": (None, (c_void_p,)),
    "gpt2_load_matrix": (None, (c_void_p, c_int32, c_void_p, c_int32, c_int32)),
    "gpt2_bias": (c_void_p, (c_void_p, c_int32)),
    "gpt2_positions": (c_void_p, (c_void_p,)),
    "gpt2_norm": (c_void_p, (c_void_p, c_int32, c_int32)),
    "gpt2_use_large_pages": (None, (c_void_p, c_size_t)),
    "gpt2_step": (c_int32, (c_void_p, c_void_p, POINTER(Step))),
    "gpt2_sample": (None, (c_void_p, c_void_p, c_int64, POINTER(Draw), c_int32, POINTER(c_int32))),
}


@functools.cache
def open_library() -> Any:
    """The library of these very sources; OSError, which says what to do, where it is not built."""
    path = library_path()
    if not path.exists():
        raise OSError("the CPU kernels are not compiled: run `python -m predictor.model.cpu.build` (make setup does)")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def instruction_set(name: str = "") -> str | None:
    """`name`, or the best one that this CPU has where it is empty; None where this CPU lacks it."""
    found: bytes | None = open_library().gpt2_instruction_set(name.encode())
    return None if found is None else found.decode()
