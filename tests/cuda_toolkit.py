"""NVIDIA's compiler without NVIDIA's registry: nvcc from Debian, its headers from PyPI, in one folder.

CUDA 12.4, since Debian has no 12.6. It compiles for the same three architectures; what it accepts may differ.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

from tests.images import mirror, run

# A release of Debian that has it; the package is unpacked, never installed.
RELEASE = "trixie"
PACKAGE = "nvidia-cuda-toolkit"
HEADERS = [
    "nvidia-cuda-runtime-cu12==12.4.127",
    "nvidia-cuda-nvcc-cu12==12.4.131",
    "nvidia-cuda-cccl-cu12==12.4.127.post1",
]

# Where things lie from the folder of nvcc; Debian's own profile names Debian's folders.
PROFILE = """
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += -I$(TOP)/include $(_SPACE_)
LIBRARIES =+ $(_SPACE_) -L$(TOP)/lib64
"""


def make_toolkit(folder: Path, release: str) -> Path:
    """A folder like /usr/local/cuda with what compiling needs; `release` is this machine's, whose mirror is asked."""
    toolkit = folder / "toolkit"
    debian = _unpacked_debian_package(folder, mirror(release))
    (toolkit / "bin").mkdir(parents=True)
    for name in ("cudafe++", "ptxas", "fatbinary", "nvlink", "cuobjdump"):
        shutil.copy2(debian / "bin" / name, toolkit / "bin")
    own = debian / "lib" / "nvidia-cuda-toolkit"
    shutil.copy2(own / "bin" / "nvcc", toolkit / "bin")
    shutil.copytree(own / "bin" / "crt", toolkit / "bin" / "crt")
    (toolkit / "bin" / "nvcc.profile").write_text(PROFILE)
    (toolkit / "nvvm" / "bin").mkdir(parents=True)
    shutil.copy2(own / "bin" / "cicc", toolkit / "nvvm" / "bin")
    shutil.copytree(own / "libdevice", toolkit / "nvvm" / "libdevice")

    wheels = folder / "wheels"
    run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), *HEADERS])
    for wheel in wheels.iterdir():
        zipfile.ZipFile(wheel).extractall(wheels)
    for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl"):
        shutil.copytree(wheels / "nvidia" / part / "include", toolkit / "include", dirs_exist_ok=True)
    (toolkit / "lib64").mkdir()
    shutil.copy2(wheels / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12", toolkit / "lib64" / "libcudart.so")
    # nvcc names it to the linker whatever is linked; it is for kernels that start kernels, and ours do not.
    run(["ar", "rcs", str(toolkit / "lib64" / "libcudadevrt.a")])
    return toolkit


def _unpacked_debian_package(folder: Path, debian: str) -> Path:
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [signed-by={keys}] {debian} {RELEASE} non-free\n")
    options = [
        *("-o", f"Dir::Etc::SourceList={folder / 'sources.list'}", "-o", "Dir::Etc::SourceParts=/dev/null"),
        *("-o", f"Dir::State::Lists={lists}", "-o", "APT::Sandbox::User=root"),
    ]
    run(["apt-get", *options, "update"])
    run(["apt-get", *options, "download", PACKAGE], cwd=folder)
    (package,) = folder.glob("*.deb")
    run(["dpkg", "--extract", str(package), str(folder / "debian")])
    return folder / "debian" / "usr"
