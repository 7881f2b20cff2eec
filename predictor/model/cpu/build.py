"""Compile the kernels into one library beside this file: `python -m predictor.model.cpu.build`.

kernels.cpp is compiled once per instruction set; which one runs is chosen when a model is made. The library's name
carries a hash of what it was made from, so a stale one is never loaded. Nothing but a C++20 compiler is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]
# Vectors wider than the baseline's registers pass through memory between functions that are inlined anyway (psabi).
# GCC 12's own AVX-512 header is what maybe-uninitialized is about (GCC bug 105593, mended in 13).
_KERNEL_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512",
]  # fmt: skip
_X86_INSTRUCTION_SETS = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}


def instruction_sets() -> dict[str, list[str]]:
    """What this machine's compiler is asked for: name and flags, slowest first."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {"generic": []} | (_X86_INSTRUCTION_SETS if on_x86 else {})


def library_path() -> Path:
    """Where the library of exactly these sources and flags is, or will be."""
    digest = hashlib.sha256(repr((_FLAGS, _KERNEL_FLAGS, instruction_sets())).encode())
    for source in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return FOLDER / "build" / f"gpt2-{digest.hexdigest()[:16]}.so"


def build(compiler: str) -> Path:
    """Compile and link; raises OSError or CalledProcessError where the compiler is missing or refuses."""
    target = library_path()
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        commands = [
            [compiler, *_FLAGS, "-c", str(FOLDER / f"{name}.cpp"), "-o", f"{folder}/{name}.o"]
            for name in ("api", "pool")
        ] + [
            [
                compiler, *_FLAGS, *_KERNEL_FLAGS, *flags, f"-DKERNELS={name}",
                "-c", str(FOLDER / "kernels.cpp"), "-o", f"{folder}/kernels_{name}.o",
            ]
            for name, flags in instruction_sets().items()
        ]  # fmt: skip
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / "linked.so"
        # In this order: of a function that several objects hold, the linker takes the first, which any CPU can run.
        objects = [
            f"{folder}/{name}.o" for name in ("api", "pool", *(f"kernels_{each}" for each in instruction_sets()))
        ]
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(linked)])
        linked.replace(target)
        for other in target.parent.glob("gpt2-*.so"):
            if other != target:  # nobody's any more; another build may be removing it too
                other.unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CPU kernels; nothing is done when they are up to date.")
    parser.add_argument("--compiler", default="c++", help="a C++20 compiler (GCC 11 or later)")
    parser.add_argument("--optional", action="store_true", help="succeed, with a notice, where they cannot be compiled")
    arguments = parser.parse_args()
    if library_path().exists():
        return
    try:
        print(f"compiled {build(arguments.compiler).name}")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        print(f"the CPU kernels were not compiled; torch will serve on CPU, more slowly:\n{detail}", file=sys.stderr)
        if not arguments.optional:
            sys.exit(1)


if __name__ == "__main__":
    main()
