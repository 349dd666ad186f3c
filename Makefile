# Needs make and Python >= 3.10; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help test demo lint types wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

test: $(READY)  ## run the tests (ARGS="-k merge -x" passes options on to pytest)
	$(BIN)/python -m pytest $(ARGS)

demo: $(READY)  ## run examples/demo.py
	$(BIN)/python examples/demo.py

lint: $(READY)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## check types
	$(BIN)/mypy

wheel: $(READY)  ## build the source archive and the wheel into dist/
	rm -rf dist
	$(BIN)/pyproject-build

clean:  ## remove everything that make has made
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find adapters lora_fn tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last, so an installation that was interrupted starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lora-fn needs Python 3.10 or newer, and '$(PYTHON)' is not: name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@
