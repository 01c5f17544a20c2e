# `make` lists the targets. Each first runs `make setup`, which does nothing when nothing changed.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-compat soak lint bench bench-aiperf

PYTHON ?= python3
BIN := .venv/bin
SETUP := $(PYTHON) tools/setup.py
CHECKPOINT ?= demo/checkpoint
PORT ?= 8000

# A small share of the machine: vLLM would reserve half the memory and pin its threads to cores.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS ?= 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## build .venv, or leave it alone when it is up to date
	@command -v $(PYTHON) >/dev/null || { \
	  echo "setup: there is no $(PYTHON); install Python 3.11 to 3.13, or name one with PYTHON=" >&2; exit 1; }
	@$(SETUP)

demo: setup ## ask a tiny checkpoint about an image and a video, on the CPU
	@$(BIN)/python tools/demo.py

serve: setup ## serve a tiny checkpoint on 127.0.0.1:$(PORT) (CHECKPOINT= serves another one)
	@test -e $(CHECKPOINT) || $(BIN)/vllm-cosmos3 make-checkpoint $(CHECKPOINT)
	@$(BIN)/vllm-cosmos3 serve $(CHECKPOINT) --surface reasoner --host 127.0.0.1 --port $(PORT)

test: setup ## run the tests
	@$(BIN)/python -m pytest $(PYTEST)

test-compat: setup ## run the contract tests on every tested vllm-cpu version
	@$(BIN)/python tools/test_compat.py $(COMPAT)

soak: setup ## load a server for a long time and watch it
	@$(BIN)/python -m pytest --no-header -s benchmarks/soak.py $(PYTEST)

lint: setup ## ruff, its formatter, and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## measure the reasoner under load
	@$(BIN)/python benchmarks/reasoner.py $(BENCH)

bench-aiperf: setup ## the same load from aiperf, in an environment of its own
	@$(SETUP) --folder .venv-aiperf --device aiperf
	@$(BIN)/python benchmarks/reasoner.py --client .venv-aiperf/bin/aiperf $(BENCH)
