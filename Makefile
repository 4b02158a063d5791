# One door for people and for CI. Every target makes or updates .venv first; PY=/path/to/python
# runs a target with an interpreter of yours instead, and installs nothing.
#   TORCH_INDEX=<url>   take torch (only torch) from another index, e.g. PyTorch's CPU builds
#   FULL=1              make bench: every point instead of the usual ones
#   VLLM=<python>       make bench: an interpreter that has vLLM, to be measured beside
#   PYTEST_ARGS=...     make test: more arguments for pytest; -n 0 runs it in one process
#   QUALITY_ARGS=...    make quality: --models smollm2 --formats int8,int4 --windows 6, and so on

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

STAMP := .venv/.up-to-date
EXTRAS := hf,dev,notebooks,bench
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)

ifeq ($(origin PY), undefined)
PY := .venv/bin/python
READY := $(STAMP)
else
READY :=
endif

# The tree is importable as it stands, so nothing has to be installed on a machine with torch.
RUN := PYTHONPATH=.:kernels$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PY)

.PHONY: help demo test check format bench quality aot gpu notebooks soak clean

help:  ## this list
	@grep -hE '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

.venv: $(STAMP)  ## the virtual environment, made when pyproject.toml or constraints.txt changed

$(STAMP): pyproject.toml constraints.txt
	@test -x .venv/bin/python || { echo "making .venv with $(BASE_PYTHON)"; \
	    $(BASE_PYTHON) -m venv .venv; }
	@.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvpaged needs Python 3.11 or newer; .venv has " + sys.version.split()[0])'
	$(if $(TORCH_INDEX),.venv/bin/python -m pip install --disable-pip-version-check --no-deps \
	    --index-url $(TORCH_INDEX) --constraint constraints.txt torch)
	@echo "installing kvpaged and what it needs into .venv"
	.venv/bin/python -m pip install --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[$(EXTRAS)]' \
	    | grep --line-buffered -vE '^(Requirement already|Looking in|Obtaining|Processing|WARNING: Location|Installing collected|  )' || test $${PIPESTATUS[0]} -eq 0
	@touch $@

demo: $(READY)  ## a real model answers through the paged cache and through DynamicCache
	@$(RUN) examples/demo.py

test: $(READY)  ## the test suite (CPU; Triton's interpreter stands in for a GPU)
	@$(RUN) -m kvpaged.testing.models smollm2 gemma3
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

check: $(READY)  ## format, lint, types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(READY)  ## let ruff format and fix what it can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(READY)  ## tokens/s, first token, KV memory and shared prefixes, beside Hugging Face
	$(RUN) -m benchmarks.host
	$(RUN) -m benchmarks.cpu_decode
	$(RUN) -m benchmarks.cpu_native
	$(RUN) -m benchmarks.generate $(if $(FULL),--full)
	$(RUN) -m benchmarks.serving $(if $(VLLM),--vllm $(VLLM))
	$(RUN) -m benchmarks.prefix $(if $(VLLM),--vllm $(VLLM))

quality: $(READY)  ## what compressed formats do to predictions, beside HF QuantizedCache
	$(RUN) -m benchmarks.quality $(QUALITY_ARGS)

PEER_KERNELS = $(if $(VLLM_KERNELS),--vllm $(VLLM_KERNELS)) $(if $(SGLANG_KERNELS),--sglang $(SGLANG_KERNELS))

aot: $(READY)  ## compile every shipped kernel for real GPUs, without one
	$(RUN) -m benchmarks.aot $(PEER_KERNELS)

gpu: $(READY)  ## everything to measure on a CUDA machine; make gpu PY=python3 installs nothing
	$(RUN) -m benchmarks.gpu $(PEER_KERNELS)

notebooks: $(READY)  ## run the notebooks and keep their outputs in the files
	$(RUN) -m jupyter execute --inplace examples/*.ipynb

soak: $(READY)  ## long random runs
	$(RUN) -m pytest -m soak $(PYTEST_ARGS)

clean:  ## remove caches and builds (not .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
