"""Compile the kernels beside this file into one library: `python -m predictor.model.cuda.build`.

It needs nvcc and nothing else: no torch, no Python headers. The image does it in a stage of its own (Dockerfile);
nothing is compiled when a server starts. The library's name carries a hash of the sources, so that one built from
other sources is never loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
# V100, A100, H100 and H200: what torch's cu126 wheels and the Dockerfile are for. CUDA 13 has no 70 any more.
ARCHITECTURES = (70, 80, 90)


def sources() -> list[Path]:
    """What nvcc is given; the headers are not among it."""
    return sorted(FOLDER.glob("*.cu"))


def library_path() -> Path:
    """Where the library of the sources and flags as they are now lies, or would."""
    digest = hashlib.sha256()
    for path in [*sources(), *sorted(FOLDER.glob("*.cuh")), FOLDER / "build.py"]:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return FOLDER / "build" / f"kernels-{digest.hexdigest()[:16]}.so"


def libraries() -> list[Path]:
    """Every library that lies here, built from these sources or from others."""
    return sorted(FOLDER.glob("build/kernels-*.so"))


def build(nvcc: str, architectures: Sequence[int]) -> Path:
    """Compile for each architecture, and for later ones as PTX of the newest, which the driver compiles when loaded.

    The CUDA runtime is torch's own, which is loaded already: there is one idea of the current device. Raises OSError or
    CalledProcessError where nvcc is missing or refuses. Libraries of other sources are removed.
    """
    target = library_path()
    target.parent.mkdir(exist_ok=True)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in sorted(architectures)]
    newest = max(architectures)
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    partial = target.with_suffix(".partial")
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-shared",
        "-cudart=shared",
        "-Xcompiler=-fPIC",
        *targets,
        *map(str, sources()),
    ]
    subprocess.run([*command, "-o", str(partial)], check=True)
    for stale in libraries():
        stale.unlink()
    partial.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels.")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler; CUDA 12.6 is the last with V100")
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        default=list(ARCHITECTURES),
        help="compute capabilities without the dot (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        print(f"compiled {build(arguments.nvcc, arguments.architectures).name}")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"the CUDA kernels were not compiled: {error}")


if __name__ == "__main__":
    main()
