# Needs make and Python >= 3.10; everything else is installed into .venv, and for test-nxd into .venv-nxd.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NXD_VENV := .venv-nxd
NXD_READY := $(NXD_VENV)/.ready
# Where it is there, the benchmarks look at XLA's graphs with its torch_xla.
XLA_PYTHON := $(if $(wildcard $(NXD_READY)),--xla-python $(NXD_VENV)/bin/python)
# Two tests at a time; those of one file one after the other, so that they share what they set up. Of the files, the
# longest first (see tests/conftest.py).
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help test test-nxd bench grid grid-page demo lint types wheel clean checkouts

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

test: $(READY)  ## run the tests (ARGS="-k merge -x" passes options on to pytest)
	$(BIN)/python $(PYTEST) $(ARGS)

test-nxd: checkouts $(NXD_READY)  ## run them beside neuronx-distributed: make test-nxd NXD=checkout [OPTIMUM=checkout]
	LORA_FN_NXD='$(abspath $(NXD))' LORA_FN_OPTIMUM='$(abspath $(OPTIMUM))' $(NXD_VENV)/bin/python $(PYTEST) $(ARGS)

bench: $(READY)  ## measure beside stock PEFT and others, and write build/bench/report.html (ARGS=--quick: fewer cells)
	$(BIN)/python -m benchmarks $(XLA_PYTHON) $(ARGS)

grid: $(READY)  ## compare all that can be combined with stock PEFT, and write docs/parity.md (about 20 minutes)
	$(BIN)/python tests/grid_report.py --measure

grid-page: $(READY)  ## write docs/parity.md, but for what `make grid` measures
	$(BIN)/python tests/grid_report.py

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
	rm -rf $(VENV) $(NXD_VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find adapters lora_fn tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

checkouts:
	@test -d '$(NXD)/src/neuronx_distributed' || { \
	  echo "NXD='$(NXD)' is no checkout of neuronx-distributed: name one with make test-nxd NXD=/path/to/it." >&2; exit 1; }
	@test -z '$(OPTIMUM)' -o -d '$(OPTIMUM)/optimum/neuron' || { \
	  echo "OPTIMUM='$(OPTIMUM)' is no checkout of optimum-neuron: name one, or leave it out." >&2; exit 1; }

define new_enough
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
  echo "lora-fn needs Python 3.10 or newer, and '$(PYTHON)' is not: name one with make PYTHON=/path/to/python3." >&2; exit 1; }
endef

# The stamps are written last, so an installation that was interrupted starts again.
$(READY): pyproject.toml constraints.txt
	$(new_enough)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

# The libraries that neuronx-distributed and Optimum Neuron import; torch_xla has the torch of its own version.
$(NXD_READY): pyproject.toml constraints-nxd.txt | checkouts
	$(new_enough)
	$(PYTHON) -m venv $(NXD_VENV)
	$(NXD_VENV)/bin/python -m pip install -c constraints-nxd.txt -e '.[test]' torch_xla boto3 tenacity optimum
	@touch $@
