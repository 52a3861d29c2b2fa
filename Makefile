# Each target works alone on a fresh clone: it makes .venv, installs what it needs, and does its job.
# PYTHON chooses the interpreter (3.10 or newer) that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread a test process: two processes of two threads each would fight over two cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: help demo test lint types check format clean

help:
	@echo "make demo    train the same deep transformer with and without good normalization and compare"
	@echo "make test    run the tests"
	@echo "make check   formatting, lint, types, import direction, tests with warnings as errors"
	@echo "make format  format the code"
	@echo "make clean   remove .venv and caches"

demo: .venv/demo
	$(BIN)/omninorm demo

test: .venv/dev
	$(PYTEST)

lint: .venv/dev
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests

types: .venv/dev
	$(BIN)/mypy

check: lint types test

format: .venv/dev
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

# Stamps, so that an interrupted step is done again.
.venv/made:
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/demo .venv/dev: .venv/%: .venv/made pyproject.toml constraints.txt
	@echo "Installing omninorm[$*] into .venv (a few minutes the first time)"
	$(INSTALL) --editable '.[$*]'
	@touch $@
