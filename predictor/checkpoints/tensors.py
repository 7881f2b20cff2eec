"""Named tensors out of a checkpoint's files, one at a time: safetensors, or pickles without code."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from predictor.errors import CheckpointError

# Names a file may put before GPT-2's own (the language-model class, and wrappers around it).
_PREFIXES = ("", "transformer.", "model.transformer.", "module.transformer.")


# What torch's unpickler raises over bytes that are no pickle.
_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    ArithmeticError, struct.error,
)  # fmt: skip


class _File(Protocol):
    mapped: bool  # tensors are views of the file, not of memory of their own

    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...


class _Safetensors:
    mapped = True

    def __init__(self, path: Path, stack: ExitStack) -> None:
        try:
            self._handle: Any = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is damaged or not a safetensors file: {error}") from error

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


class _Pickle:
    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                # Only the zip format of torch >= 1.6 can be mapped; the older one is read whole.
                self.mapped = file.read(2) == b"PK"
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True if self.mapped else None)
        except pickle.UnpicklingError as error:
            # torch 2.13 says this of functions and classes it does not know, and of nothing else.
            if "global" not in str(error).lower():
                raise CheckpointError(f"{path.name} is damaged, or not written by torch.save") from error
            raise CheckpointError(
                f"{path.name} holds more than tensors (a pickle with code) and is refused; "
                "ask its author for safetensors"
            ) from error
        except _DAMAGE as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"{path.name} is damaged: {reason}") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path.name} is no dictionary of tensors")
        self._tensors: dict[str, Tensor] = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        # Memory of its own is let go with the tensor, so that file and model do not add up.
        return self._tensors[name] if self.mapped else self._tensors.pop(name)


class TensorFiles:
    """All tensors of a checkpoint folder by name. A context manager: it holds the files open."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._owner: dict[str, _File] = {}
        paths = list(_weight_files(folder))
        for path in paths:
            file = _Safetensors(path, self._stack) if path.suffix == ".safetensors" else _Pickle(path)
            for name in file.names():
                self._owner[name] = file
        self._last: Tensor | None = None
        self._ahead = _ReadAhead(paths)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        self._ahead.end()
        self._stack.close()
        trim_heap()

    def fetch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name` of `shape`, on CPU, in the file's dtype; to be asked for once.

        It may be a view of the file, valid until the next call.
        """
        for prefix in _PREFIXES:
            if prefix + name in self._owner:
                break
        else:
            prefix = ""
        if prefix + name not in self._owner:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}")
        self._release_last()
        file = self._owner[prefix + name]
        tensor = file.tensor(prefix + name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{prefix + name} has shape {tuple(tensor.shape)}, and config.json makes it {shape}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{prefix + name} holds {tensor.dtype} and must hold floating-point numbers")
        self._ahead.fetched_bytes += tensor.nbytes
        if file.mapped:
            _advise(tensor, _MADV_POPULATE_READ)
            self._last = tensor
        return tensor

    def _release_last(self) -> None:
        """Give the pages of the tensor read before back to the system, so that file and model do not add up."""
        if self._last is not None:
            _advise(self._last, mmap.MADV_DONTNEED)
            self._last = None
        else:
            trim_heap()


class _ReadAhead:
    """Lets Linux read the files from the disk while tensors are packed, some way ahead of them, in the files' order."""

    _MOST_BYTES = 512 * 2**20  # ahead of what was fetched: a file may be larger than the memory
    _CHUNK_BYTES = 128 * 2**10  # of one call: Linux leaves out what is beyond its own read-ahead, mostly this much

    def __init__(self, paths: list[Path]) -> None:
        self.fetched_bytes = 0
        self._paths, self._ended = paths, threading.Event()
        self._thread: threading.Thread | None = None
        if sys.platform == "linux":
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        # A file that cannot be read is its reader's to report.
        with contextlib.suppress(OSError):
            self._ask()

    def _ask(self) -> None:
        asked_bytes = 0
        for path in self._paths:
            with open(path, "rb") as file:
                for start in range(0, path.stat().st_size, self._CHUNK_BYTES):
                    while asked_bytes > self.fetched_bytes + self._MOST_BYTES:
                        if self._ended.wait(0.005):
                            return
                    if self._ended.is_set():
                        return
                    os.posix_fadvise(file.fileno(), start, self._CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
                    asked_bytes += self._CHUNK_BYTES


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold the weights: an index's shards or one file; safetensors before pickles."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            yield folder / single
            return
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index.name} is not a valid index of shards") from error
            for name in names:
                # An index comes with the checkpoint: it may name files beside it and no others.
                if Path(name).name != name or not (folder / name).is_file():
                    raise CheckpointError(f"{index.name} names {name}, which is not in the folder")
                yield folder / name
            return
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or one of their .index.json"
    )


# Map all pages at once: 11 GB/s from the page cache, where one fault after the other takes 3. Linux 5.14; elsewhere the
# call fails and the faults come.
_MADV_POPULATE_READ = 22


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell Linux what will become of a mapped tensor's pages: wanted all, or not any more.

    Pages that are given up would be read again from the file if touched.
    """
    # A tensor with strides of its own (expanded, say) may claim more bytes than its storage has.
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def trim_heap() -> None:
    """Give free memory inside glibc's heap back to the system.

    Blocks below 32 MiB come from the heap once one of their size was freed, and the transposed copies of a load leave
    holes in it: without this a load of 200 MB peaks at 1.41 x the weights and stays there, with it it peaks at 1.08 x
    and ends at 1.01 x. It takes 0.8 ms a tensor.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
