# Works on a machine with Python 3.11 or later and pip: the first target that needs it makes .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := OMP_NUM_THREADS=2 $(BIN)

.PHONY: help demo test test-all lint bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      search the handwritten digits study under a limit and print its front"
	@echo "make test      the tests, without the slow ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff and mypy"
	@echo "make bench     the benchmarks (some need the data described in their first lines)"
	@echo "make docs      write docs/cli.md from the program's --help"
	@echo "make clean     remove .venv, caches and the demo's results"

# torch comes first and pinned: an unpinned torch may bring several GB of CUDA packages.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "rankopt needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making .venv (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,demo]'
	@touch $@

# A second call resumes the finished study: it adds no trials and writes the same model again.
demo: $(STAMP)
	$(RUN)/rankopt search studies/digits.yaml --out studies/runs/digits --force
	$(RUN)/rankopt front studies/digits.yaml

# Two files at a time, each on one thread. What is slow (Ray, latency) wants the machine to itself.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: test
	$(RUN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rankopt

bench: $(STAMP)
	@for script in benchmarks/*.py; do echo "== $$script"; $(RUN)/python "$$script" || exit 1; done

docs: $(STAMP)
	$(RUN)/python docs/make_cli.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist studies/runs
	find rankopt tests studies benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
