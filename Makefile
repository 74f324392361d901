# `make demo` and `make test` are all that a fresh machine needs: each makes what it uses first.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests wait for processes, disks and networks more than they compute: one more than the two cores
# that `make test` is meant for.
WORKERS ?= 3
PYTEST_ARGS ?=
# The whole of `make test` has to end within this time, or it fails (0: no limit).
export MTCKPT_TEST_BUDGET_S ?= 720
# Tests start many hundred processes: none compiles the sources anew, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

# The environment is made again when what it is made from changes, not when a clock says so.
STAMP := $(VENV)/.made-$(shell cat requirements-dev.txt pyproject.toml scripts/setup_env.sh | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test check format torture bench docs clean tools

help:
	@echo "make demo     train, kill, resume: the whole thing at work"
	@echo "make demo-cluster  the same over several hosts, one of which is lost, and then another"
	@echo "make test     the tests"
	@echo "make check    format, lint, types, layers, docs"
	@echo "make format   rewrite the sources as make check wants them"
	@echo "make torture  the long versions of the tests (hours)"
	@echo "make bench    the benchmarks, side by side with others"
	@echo "make docs     build the documentation into site/"
	@echo "make clean    remove everything that was made, .venv too"

$(STAMP):
	@bash scripts/setup_env.sh "$(PYTHON)" "$(VENV)"
	@rm -f $(VENV)/.made-*
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

demo-cluster: $(STAMP)
	$(BIN)/python examples/demo_cluster.py

tools:
	@bash scripts/setup_test_tools.sh

test: $(STAMP) tools
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not torture and not gpu" \
		--durations=25 $(PYTEST_ARGS)

# Each of these prints nothing but what is wrong, and the next one runs only if it found nothing.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHONPATH=scripts $(BIN)/zensical build --strict --clean

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

torture: export MTCKPT_TEST_BUDGET_S = 0
# One test after the other is given out, the longest first: the end waits for none that just began.
torture: $(STAMP) tools
	$(BIN)/python -m pytest -n $(WORKERS) --dist load --maxschedchunk 1 -m "torture and not gpu" \
		--durations=25 $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(STAMP)
	PYTHONPATH=scripts $(BIN)/zensical build --strict --clean

clean:
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
