# Every target sets up what it needs: a fresh clone and `make lab` or `make test` are enough.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGEDLAB_DATA ?= $(abspath ../shared/data)
export PAGEDLAB_DATA

.PHONY: lab demo test lint bench mutants format browser clean

lab: $(STAMP)  ## JupyterLab on the quickstart (token kept, loopback only)
	$(BIN)/pagedlab lab

demo: $(STAMP)  ## the same without a browser: prints a comparison, writes report.html
	$(BIN)/pagedlab demo --out report.html

test: $(STAMP) lint browser  ## lint, types, import rules, then every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

bench: $(STAMP)
	$(BIN)/pagedlab bench cache
	$(BIN)/pagedlab bench kernel
	$(BIN)/pagedlab bench engine

mutants: $(STAMP)  ## small changes to the code, each of which a test should notice; goes on where it stopped
	$(BIN)/python benchmarks/mutants.py --package all --sample 300 --seed 0 --out build/mutants.json

# Chromium for the browser tests, where this user may install it; they skip with a reason where not.
browser:
	@command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || { \
	  if command -v apt-get >/dev/null 2>&1; then \
	    SUDO=""; [ "$$(id -u)" = 0 ] || SUDO="sudo -n"; \
	    ($$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq chromium) >/dev/null 2>&1; \
	  fi; \
	  command -v chromium >/dev/null 2>&1 || echo "chromium is not here and could not be installed: browser tests will skip"; }

# torch first and pinned: a bare `torch` would bring gigabytes of CUDA libraries to machines without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pagedlab needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
