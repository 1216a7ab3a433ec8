# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
EVAL_VENV ?= .venv-eval
BENCH_VENV ?= .venv-bench
TITAN_VENV ?= .venv-titan
# Test processes on two cores: a test often waits for a file, a server or another process.
JOBS ?= 3
UV_VERSION := 0.13.9
UV := $(VENV)/bin/uv
SHELL := /bin/bash

# pip separates extra wheel folders by spaces, uv by commas.
ifdef PIP_FIND_LINKS
comma := ,
empty :=
space := $(empty) $(empty)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(PIP_FIND_LINKS))
endif

.DEFAULT_GOAL := help
.PHONY: help install install-eval install-bench install-titan quickstart test test-fast lint check-types layers unit docs notebooks lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## create .venv with pinned versions of everything except the llm-foundry evaluation

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.10 to 3.13 is required, found $$($(PYTHON) --version); choose one with: make PYTHON=python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.installed: $(UV) requirements/dev.txt setup.py pyproject.toml
	$(UV) pip install --quiet --compile-bytecode --python $(VENV)/bin/python -r requirements/dev.txt
	$(UV) pip install --quiet --python $(VENV)/bin/python --no-deps --editable .
	@$(VENV)/bin/python -c "import sys; from pathlib import Path; from open_lm.utils.torchrun import install_script; install_script(Path(sys.executable).parent)"
	@$(VENV)/bin/python -m compileall -q open_lm
	@touch $@

install-eval: $(EVAL_VENV)/.installed  ## create .venv-eval with llm-foundry, for in-context-learning evaluation (about 6.5 GB)

$(EVAL_VENV)/.installed: $(UV) requirements/eval.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "llm-foundry requires Python 3.10 to 3.12, found $$($(PYTHON) --version); choose one with: make install-eval PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(EVAL_VENV)
	$(UV) pip install --quiet --python $(EVAL_VENV)/bin/python -r requirements/eval.txt
	$(UV) pip install --quiet --python $(EVAL_VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

install-bench: $(BENCH_VENV)/.installed  ## create .venv-bench with the libraries that scripts/bench_loader.py compares with

$(BENCH_VENV)/.installed: $(UV) requirements/bench.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(UV) pip install --quiet --python $(BENCH_VENV)/bin/python -r requirements/bench.txt
	@touch $@

install-titan: $(TITAN_VENV)/.installed  ## create .venv-titan with torchtitan, which scripts/bench_train.py compares with (Python 3.11 or newer)

$(TITAN_VENV)/.installed: $(UV) requirements/torchtitan.in setup.py
	$(PYTHON) -m venv $(TITAN_VENV)
	$(UV) pip install --quiet --python $(TITAN_VENV)/bin/python -r requirements/torchtitan.in
	$(UV) pip install --quiet --python $(TITAN_VENV)/bin/python --no-deps --editable .
	@touch $@

quickstart: install  ## the full pipeline, offline, in minutes: text -> shards -> a trained and evaluated model
	$(VENV)/bin/python scripts/quickstart.py

test: lint check-types layers unit  ## install, then run linters, type checks, layer contracts and all tests

test-fast: install  ## run the tests that start no other process or server (under two minutes)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not processes"

lint: install  ## run ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check-types: install  ## run mypy
	$(VENV)/bin/mypy
	MYPYPATH=scripts/bench:scripts/checks $(VENV)/bin/mypy $$(find scripts eval -type f -name '*.py')

layers: install  ## check that packages import downwards only
	$(VENV)/bin/lint-imports

unit: install  ## run all tests
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15

docs: install  ## build the documentation site into site/
	$(VENV)/bin/zensical build --strict

notebooks: install  ## run notebooks/*.py and write the .ipynb files; RUN=FOLDER selects the run of metric_graphs
	cd notebooks && $(if $(RUN),OPEN_LM_RUN="$(abspath $(RUN))") ../$(VENV)/bin/jupytext --to ipynb --execute *.py

lock: install  ## pin requirements/*.txt from requirements/*.in; existing pins that still fit are kept
	for name in dev train preprocess; do \
		cp requirements/$$name.txt requirements/$$name.txt.new && \
		$(UV) pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header \
			-c requirements/known_good.in requirements/core.in requirements/$$name.in -o requirements/$$name.txt.new && \
		sed -i -E '/^(nvidia-|cuda-|triton)/d' requirements/$$name.txt.new && \
		mv requirements/$$name.txt.new requirements/$$name.txt || exit 1; \
	done
	for name in eval bench; do \
		$(UV) pip compile --quiet --universal --python-version 3.10 --custom-compile-command "make lock" \
			requirements/$$name.in -o requirements/$$name.txt || exit 1; \
	done

clean:  ## remove environments, caches and generated files
	rm -rf $(VENV) $(EVAL_VENV) $(BENCH_VENV) $(TITAN_VENV) build dist site *.egg-info quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
