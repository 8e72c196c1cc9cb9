# Two commands need nothing but Python 3.11+: `make train` and `make test`. Each sets itself up, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
AOT_VENV ?= .venv-aot
# Compiling every module of every package takes longer than all the rest; Python compiles what it imports, and keeps it,
# whatever the environment says: tests start many processes, each of which would compile all anew.
export PYTHONDONTWRITEBYTECODE =
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-fast test-slow test-aot check bench docs notebooks notebooks-run clean

train: $(VENV)/.experiments  ## train the tiny Mamba on Python's standard library, or go on with it
	$(BIN)/python -m experiments.causal_lm tiny $(ARGS)

test: $(VENV)/.test  ## all tests but the slow ones
	$(BIN)/python -m pytest -q -n auto $(ARGS)

test-fast: $(VENV)/.test  ## a minute: architecture, references at one shape, a tiny run that trains, resumes, generates
	$(BIN)/python -m pytest -q -n auto @tests/fast.txt $(ARGS)

test-slow: $(VENV)/.test  ## the slow ones: killed runs, the tiny run's promised result
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# Its own environment: JAX looks for a TPU wherever libtpu is.
test-aot:  ## compile for TPUs and GPUs that are not here, in ten minutes; skipped where their compilers have no wheel
	@$(MAKE) --no-print-directory VENV=$(AOT_VENV) $(AOT_VENV)/.test
	@if $(MAKE) --no-print-directory VENV=$(AOT_VENV) $(AOT_VENV)/.aot; then \
	  XLA_FLAGS= JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(AOT_VENV)/bin/python -m pytest -q -n auto tests/aot -m 'not slow and not gpu' $(ARGS); \
	else echo "test-aot is skipped: libtpu or jax-cuda12-plugin cannot be installed here (Linux on x86-64 has both)"; fi

check: $(VENV)/.test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.experiments  ## time the operations beside their alternatives
	$(BIN)/python -m experiments.bench $(ARGS)

docs: $(VENV)/.docs  ## the documentation, site/index.html; fails where a link leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet $(ARGS)

notebooks: $(VENV)/.notebooks  ## open the notebooks
	PYTHONPATH="$(CURDIR)" $(BIN)/jupyter lab notebooks

notebooks-run: $(VENV)/.notebooks  ## run them and keep what they print and draw; ARGS="--check 01": compare only
	$(BIN)/python notebooks/execute.py $(ARGS)

clean:
	rm -rf $(VENV) $(AOT_VENV) site

$(VENV)/.experiments: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[experiments]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[experiments,test]'
	touch $@ $(VENV)/.experiments

$(VENV)/.aot: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[aot]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.notebooks: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[notebooks]'
	touch $@ $(VENV)/.experiments

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
