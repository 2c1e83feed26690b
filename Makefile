# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
# Needs Python >= 3.11 with its venv module, make and a C++ compiler (torch.compile calls it).

PYTHON ?= python3
# Test processes at once. Each runs torch with one thread.
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := graphopt passes cost_model tests benchmarks docs $(wildcard demo)

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[.a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([.a-z]+):.*## (.*)/\1|\2/' \
	    | while IFS='|' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

.PHONY: .venv
.venv: $(STAMP) ## Make the virtual environment, with graphopt installed in editable form

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "graphopt needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another one: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); echo "could not make $(VENV): on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Train a model on the handwritten digits and show what graphopt did
	$(BIN)/python -m demo.train_digits

# Everything below that runs tests keeps torch to one thread a process: two spinning thread pools on two
# cores are many times slower than one thread.
check test fuzz soak reach: export OMP_NUM_THREADS = 1
check test fuzz soak reach: export MKL_NUM_THREADS = 1
check test fuzz: export TORCHINDUCTOR_COMPILE_THREADS = 1

.PHONY: check
check: $(STAMP) ## Formatting, lint, types, layers and the examples in docstrings
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q --doctest-modules graphopt docs/generate --ignore graphopt/integrations/lightning.py

.PHONY: test
test: check ## All checks and all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## The property tests with thousands of examples each
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m hypothesis --hypothesis-profile fuzz $(PYTEST_ARGS)

.PHONY: soak
soak: $(STAMP) ## Kill the workers of an exploration 100 times and its master 20 times; 10,000 trials
	GRAPHOPT_SOAK=1 $(BIN)/python -m pytest -s -k soak tests/exploration $(PYTEST_ARGS)

.PHONY: reach
reach: $(STAMP) ## Capture and step many published architectures; writes docs/models.md
	$(BIN)/python -m benchmarks.reach
	$(BIN)/python -m benchmarks.readme_table

.PHONY: bench
bench: $(STAMP) ## Time training steps against eager and torch.compile, count bytes kept; fills the README's tables
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.bytes_kept
	$(BIN)/python -m benchmarks.readme_table

.PHONY: docs
docs: $(STAMP) ## Build the documentation into build/site; a warning is an error
	$(BIN)/python -m docs.generate.floors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html opens from disk"

.PHONY: format
format: $(STAMP) ## Format the sources and repair what the linter can repair
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: clean
clean: ## Remove the virtual environment, caches and build results
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
