# Every target does its own set-up: `git clone … && cd … && make test` is all there is to it.
# Stamp files in the virtual environment make the second run cheap.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; \
	done)
ifeq ($(strip $(PYTHON)),)
$(error Python 3.11 or later is needed; install it or name it: make PYTHON=/path/to/python)
endif

VENV ?= .venv
# The pins are those of the interpreter: JAX 0.10 is the last for Python 3.11.
PINS ?= requirements/ci-py31$(shell $(PYTHON) -c 'import sys; print(1 if sys.version_info < (3, 12) else 2)').txt
JAX_VENV ?= .venv-jax
JAX_PYTHON ?= python3.12
INTEGRATIONS_VENV ?= .venv-integrations
DOCS_VENV ?= .venv-docs
PYTEST_WORKERS ?= 2

BIN := $(VENV)/bin
JAX_BIN := $(JAX_VENV)/bin
# One thread per test worker: with two the Triton interpreter is slower, not faster.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help venv test test-jax-newest test-integrations docs lint types format demo bench clean

help:
	@echo "make test   lint and types, then all tests (minutes)"
	@echo "make demo   dense against pyramid sparse attention on a real video clip"
	@echo "make bench  the CPU benchmark; rows go to outputs/bench"
	@echo "make docs   the documentation's site, to outputs/site"
	@echo "make lint   ruff check and ruff format --check"
	@echo "make types  pyright over the packages, typed callers and the README's examples"
	@echo "make clean  remove environments, caches and outputs"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that a CPU build of the pinned version is taken where one is offered.
$(VENV)/.installed: pyproject.toml $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(PINS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(PINS) \
		-e '.[torch,jax,viz,demo,bench,test]'
	@touch $@

venv: $(VENV)/.installed

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/typing/check.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint types
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --durations 10

demo: venv
	$(BIN)/psa demo

bench: venv
	$(BIN)/python -m benchmarks run --device cpu

$(JAX_BIN)/python:
	$(JAX_PYTHON) -m venv $(JAX_VENV)

$(JAX_VENV)/.installed: pyproject.toml requirements/ci-py312.txt | $(JAX_BIN)/python
	$(JAX_BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c requirements/ci-py312.txt -e '.[jax,test]'
	@touch $@

test-jax-newest: $(JAX_VENV)/.installed
	$(JAX_BIN)/python -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'
	$(ONE_THREAD) $(JAX_BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --durations 5 \
		tests/specs tests/jax

# Model libraries have an environment of their own: their dependencies are not ours.
$(INTEGRATIONS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(INTEGRATIONS_VENV)
	$(INTEGRATIONS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PINS) torch
	$(INTEGRATIONS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[torch,integrations]' accelerate kernels peft pytest pytest-timeout
	@touch $@

test-integrations: $(INTEGRATIONS_VENV)/.installed
	$(ONE_THREAD) $(INTEGRATIONS_VENV)/bin/python -m pytest --durations 5 tests/integrations

$(DOCS_VENV)/.installed: pyproject.toml requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c requirements/docs.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_VENV)/.installed
	$(DOCS_VENV)/bin/python docs/_site/config_table.py
	$(DOCS_VENV)/bin/mkdocs build --quiet

clean:
	rm -rf $(VENV) $(JAX_VENV) $(INTEGRATIONS_VENV) $(DOCS_VENV) build dist outputs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
