# `make help` lists what there is. Everything runs in the virtual environment $(VENV), which is made on first use.
PYTHON ?= python3
VENV ?= .venv
# An index to take torch from besides the configured one; empty lets scripts/install.sh choose.
TORCH_INDEX ?=
# Test processes. Each computes on one thread, so that results do not depend on the machine.
WORKERS ?= 2

export PYTHON TORCH_INDEX
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
NO_GPU := not gpu and not multi_gpu
INSTALL_INPUTS := pyproject.toml constraints.txt constraints-cuda.txt scripts/install.sh

.DEFAULT_GOAL := help
.PHONY: help install demo test quick test-slow lint format clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(VENV)/.installed ## the command alone, without what tests need, as $(VENV)/bin/pithwood
	@echo "installed: $(BIN)/pithwood"

demo: $(VENV)/.installed ## install, then train a sparse language model on real text (under 10 minutes on 2 cores)
	$(BIN)/pithwood train demo

test: $(VENV)/.installed-dev ## the CPU tests (under 10 minutes on 2 cores)
	$(PYTEST) -m "not slow and $(NO_GPU)"

quick: $(VENV)/.installed-dev ## a minute's worth of tests
	$(PYTEST) -m "quick and not slow and $(NO_GPU)"

test-slow: $(VENV)/.installed-dev ## the long CPU tests
	$(PYTEST) -m "slow and $(NO_GPU)"

lint: $(VENV)/.installed-dev ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## repair style and formatting where that can be done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(INSTALL_INPUTS)
	scripts/install.sh $(VENV)
	touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS)
	scripts/install.sh $(VENV) dev
	touch $@ $(VENV)/.installed
