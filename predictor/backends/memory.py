"""Memory that a backend has left behind."""

from __future__ import annotations

import ctypes
import gc

import torch


def give_back() -> None:
    """Return what nothing refers to any more to the system. Blocking: some tenths of a second."""
    gc.collect()  # a model's parts refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # glibc keeps freed memory for itself until it is told; other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
