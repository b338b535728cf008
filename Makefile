# Everything a newcomer, a developer and CI run. `make` alone lists it.

PYTHON ?= python3
VENV ?= .venv
CLOISTER_DATA ?= ../shared/data
TOPIC ?=
ARGS ?=
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 3) + 1)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# Nothing phones home; one thread a process keeps results repeatable and test workers out of each other's way.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export OMP_NUM_THREADS = 1
export CLOISTER_DATA

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format figures results docs proto bundle clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.sim ## Train across simulated hospitals on this machine
	@$(BIN)/cloister-sim run breast-cancer $(ARGS)

test: lint ## Lint, check types, run the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) -q -m "not slow" tests $(ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) -q -m slow tests $(ARGS)

lint: $(VENV)/.dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings --pythonpath $(BIN)/python

format: $(VENV)/.dev ## Rewrite the code in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

figures: $(VENV)/.dev ## Run a benchmark: make figures TOPIC=study
	@test -n "$(TOPIC)" || { echo "Name a benchmark: make figures TOPIC=study"; exit 2; }
	@$(BIN)/python simulations/benchmarks/$(TOPIC).py $(ARGS)

results: $(VENV)/.dev ## Run every scenario and write docs/results.md
	@$(BIN)/python simulations/benchmarks/results_page.py $(ARGS)

docs: $(VENV)/.dev ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

proto: ## Write the code of the control service from shared/cloister_shared/control.proto
	@$(PYTHON) -m venv build/proto && build/proto/bin/pip install -qq 'grpcio-tools==1.70.0' 'setuptools<81'
	@cd shared && ../build/proto/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. cloister_shared/control.proto

bundle: | $(BIN)/python ## Pack an install without a network: a hospital's, ARGS="--with molecules", or ARGS=coordinator
	@$(BIN)/python client/deploy/bundle.py $(ARGS)

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find shared server client simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

# A stamp records an install; a change of the dependencies makes it stale.
$(VENV)/.sim: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Cloister into $(VENV) (a few minutes the first time) ..."
	@$(PIP) -e '.[sim]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Cloister and its development tools into $(VENV) (a few minutes the first time) ..."
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.sim $@
