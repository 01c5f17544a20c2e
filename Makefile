# `make` lists the targets. Each first runs `make setup`, which does nothing when nothing changed.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve screenshots test test-compat soak lint docs bench bench-aiperf train-demo

PYTHON ?= python3
BIN := .venv/bin
SETUP := $(PYTHON) tools/setup.py

TINY := demo/checkpoint
CHECKPOINT ?= demo
PORT ?= 8000
COMPAT ?= 0.28.0 0.30.0 0.32.0
BENCH ?= --quick
SOAK ?= --quick --concurrency 64 --output-tokens 16 --fps 2 --requests 2000

# The demo checkpoint's own sizes; the defaults are those of Nano, hours on a CPU.
DEMO := --enforce-eager --max-model-len 4096 --max-num-seqs 16 \
  --default-sampling-params '{"size": "320x192", "num_frames": 17, "fps": 12}'

# A small share of the machine: vLLM would reserve half the memory and pin its threads to cores.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS ?= 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## build .venv, or leave it alone when it is up to date
	@command -v $(PYTHON) >/dev/null || { echo >&2 \
	  "setup: there is no $(PYTHON); install Python 3.11, 3.12 or 3.13, or name one with PYTHON="; exit 1; }
	@$(SETUP)

demo: setup ## a small trained checkpoint makes three clips and says what they show (CPU or GPU)
	@$(BIN)/python tools/demo.py

serve: setup ## serve the small trained checkpoint (CHECKPOINT=, PORT=)
	@$(BIN)/vllm-cosmos3 serve $(CHECKPOINT) --host 127.0.0.1 --port $(PORT) \
	  $(if $(filter demo demo-%,$(CHECKPOINT)),$(DEMO))

test: setup ## run the tests (PYTEST= adds arguments); as root it installs Chromium
	@$(BIN)/python tools/chromium.py
	@$(BIN)/python -m pytest --numprocesses auto $(PYTEST)

screenshots: setup ## make the README's pictures of the playground, with the demo checkpoint
	@$(BIN)/python tools/chromium.py
	@$(BIN)/python tools/screenshots.py

test-compat: setup ## run the contract tests on several vllm-cpu versions (COMPAT=)
	@$(BIN)/python tools/test_compat.py $(COMPAT)

soak: setup $(TINY)/model_index.json ## kill workers, read damaged files, try the API, send 2000 requests twice (SOAK=)
	@$(BIN)/python tests/soak.py --rounds 50
	@$(BIN)/python tests/soak_files.py
	@$(BIN)/python tests/soak_api.py $(TINY)
	@$(BIN)/python tests/soak_media.py $(TINY)
	@$(BIN)/python benchmarks/reasoner.py --serve $(TINY) $(SOAK)

lint: setup ## ruff, its formatter, mypy, and a strict build of the documents
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mkdocs build --quiet --strict

docs: setup ## build the documentation site into site/
	@$(BIN)/mkdocs build --strict

bench: setup $(TINY)/model_index.json ## measure the reasoner under load (BENCH= changes the load)
	@$(BIN)/python benchmarks/reasoner.py --serve $(TINY) $(BENCH)

bench-aiperf: setup $(TINY)/model_index.json ## the same load sent by aiperf, which gets .venv-aiperf
	@$(SETUP) --folder .venv-aiperf --device aiperf
	@$(BIN)/python benchmarks/reasoner.py --serve $(TINY) \
	  --client .venv-aiperf/bin/aiperf --tokenizer $(TINY) $(BENCH)

train-demo: ## say how the demo checkpoint is trained on one GPU, command by command
	@cat training/README.md

$(TINY)/model_index.json: | setup
	@$(BIN)/vllm-cosmos3 make-checkpoint $(TINY)
