# Needs Python 3.11 or later and pip; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Every benchmark that runs on its own, with no peer to install.
BENCHMARKS := benchmarks/sleeping_stages.py benchmarks/simulator_speed.py benchmarks/balance.py benchmarks/replay.py benchmarks/traffic.py \
	benchmarks/trace_pipeline.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## the tour, on this machine
	$(BIN)/counterflow demo

test: $(INSTALLED)  ## every test but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(INSTALLED)  ## the slow tests only
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## every benchmark that needs no peer
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done

clean:  ## remove caches and outputs, keep .venv
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,dev]'
	@touch $@
