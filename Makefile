# Everything starts here: each target makes .venv with what it needs, once. `make serve` and `make test` need no root, no GPU and no setting.
#   PYTHON=python3.12 make serve            another interpreter (3.11 or newer)
#   TORCH_INDEX_URL=URL make serve          take torch from that package index (for example one with CPU builds)
#   ARGS="--port 9000" make serve           flags for the command
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: help serve test acceptance lint format bench clean

help:
	@echo 'make serve       install, fetch the embedded model once, serve on http://127.0.0.1:8000'
	@echo 'make test        install with the test extras, run the whole suite (under 10 minutes)'
	@echo 'make acceptance  the long runs: soaks, load, PostgreSQL, wheels'
	@echo 'make bench       measure a running server, for example: make bench ARGS="--concurrency 1,4,8"'
	@echo 'make lint        ruff and strict mypy'
	@echo 'make format      ruff format, and what ruff can mend'
	@echo 'make clean       remove $(VENV) and what tools have cached'

# The interpreter, before anything is made: a Debian python3 comes without venv, and Triton compiles against Python.h at run time.
$(VENV)/bin/python:
	@if [ -z '$(PYTHON)' ]; then \
	  echo 'Python 3.11 or newer is needed and no python3 here is. On Debian or Ubuntu: sudo apt-get install python3 python3-venv' >&2; \
	  echo 'If it is installed under another name: make serve PYTHON=/path/to/python3.12' >&2; exit 1; fi
	@if ! '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "PYTHON=$(PYTHON) is $$('$(PYTHON)' -V 2>&1); 3.11 or newer is needed." >&2; exit 1; fi
	@if ! '$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null; then \
	  v=$$('$(PYTHON)' -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install $$v-venv" >&2; exit 1; fi
	@echo 'Making $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv '$(VENV)'

# torch comes first and alone, so that TORCH_INDEX_URL serves for it and nothing else.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@$(MAKE) -s check-compiler
	@if [ -n "$${TORCH_INDEX_URL:-}" ]; then \
	  spec=$$($(VENV)/bin/python -c 'import tomllib; print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))'); \
	  echo "Installing $$spec from TORCH_INDEX_URL"; $(PIP) install --index-url "$$TORCH_INDEX_URL" "$$spec"; fi
	@echo 'Installing the appliance (a few minutes the first time)'
	@$(PIP) install -q --progress-bar on -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo 'Installing the test extras'
	@$(PIP) install -q --progress-bar on -e '.[test,postgresql]'
	@mkdir -p $(VENV)/typing/appliance && ln -sfn ../../../kernels $(VENV)/typing/appliance/kernels
	@touch $@

# Without a GPU a missing compiler costs speed only (plain torch serves); with one, Triton cannot work without it.
.PHONY: check-compiler
check-compiler:
	@missing=''; \
	command -v gcc >/dev/null 2>&1 && command -v g++ >/dev/null 2>&1 || missing='build-essential'; \
	$(VENV)/bin/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
	  || missing="$$missing $$($(VENV)/bin/python -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"; \
	if [ -n "$$missing" ]; then \
	  echo "Missing for compiled kernels: $$missing. On Debian or Ubuntu: sudo apt-get install $$missing" >&2; \
	  if [ -e /dev/nvidiactl ]; then echo 'This machine has an NVIDIA GPU, and Triton needs them: stopping here.' >&2; exit 1; fi; \
	  echo 'Going on: without them the CPU path is slower.' >&2; fi

# On a terminal, the shell's job control gives the server its own foreground process group: Ctrl-C then drains the server and make, which would
# otherwise die of the same signal, sees it leave with 0.
serve: $(VENV)/.installed
	@if [ -t 0 ]; then set -m; fi; status=0; $(VENV)/bin/appliance serve $(ARGS) || status=$$?; exit $$status

bench: $(VENV)/.installed
	@$(VENV)/bin/appliance bench $(ARGS)

test: $(VENV)/.installed-test
	@$(VENV)/bin/pytest $(ARGS)

acceptance: $(VENV)/.installed-test
	@$(VENV)/bin/pytest -m acceptance --timeout 3600 $(ARGS)

lint: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
