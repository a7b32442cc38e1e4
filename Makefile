# `make quickstart` trains, `make test` tests. Both set up .venv on the first call.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help quickstart test lint benchmark gpu clean

help:
	@echo 'make quickstart   train a small MuM on the embedded scenes (CPU, about 6 minutes after the set-up)'
	@echo 'make test         run the tests'
	@echo 'make lint         check style, format and types'
	@echo 'make benchmark    measure speed on this machine (CPU: 10 minutes; ARGS=--quick: 90 seconds)'
	@echo 'make gpu          on a GPU, 10 minutes, no network needed: correctness, speed, a page (docs/gpu.md)'
	@echo 'make clean        remove $(VENV)'
	@echo 'Variables: PYTHON=python3.11, VENV=.venv, ARGS="more arguments of the command"'

quickstart: $(VENV)/.installed
	$(BIN)/python -m fastmum.train --config quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --python-executable $(BIN)/python

benchmark: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# Installs nothing: it runs in the checkout, and skips what needs packages that are missing.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'fastmum needs Python 3.11 or later: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.installed-dev: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e '.[dev]'
	@touch $@ $(VENV)/.installed
